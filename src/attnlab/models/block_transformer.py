"""Block Transformer: a model over blocks of tokens, and one over the tokens of a block, which the first gives a context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.masks import check_mask, zero_masked
from attnlab.core.state import State
from attnlab.core.tokens import Tokens
from attnlab.models.block import Block
from attnlab.models.language import CausalLM
from attnlab.models.norms import create_norm
from attnlab.models.registry import models
from attnlab.models.sampling import generate
from attnlab.models.stack import BlockOptions, build_blocks, layer_schedule, require_causal

CONDITIONINGS = ("prefix", "sum")
"""How the context of a block reaches its tokens."""


@models.register("block_transformer", paper="block-transformer")
class BlockTransformer(nn.Module):
    r"""Token ids to logits of the next token, from coarse to fine (Ho et al. 2024, Block Transformer, section 2).

    Tokens are cut into blocks $B_0, B_1, \dots$ of L, the first of L - 1 learned pads and one token. With lookup embeddings
    $e$ of width D / L, a block decoder $G$, and a token decoder $f$ with embeddings $E$ of its own, both causal,

    $$c_i = G\big([e(B_{0,1}) \| \dots \| e(B_{0,L})], \dots, [e(B_{i,1}) \| \dots \| e(B_{i,L})]\big)_i, \qquad
      B_{i+1} \sim f\big([\, W c_i;\; \mathrm{BOS};\; E(B_{i+1,1}), \dots, E(B_{i+1,L-1})\,]\big)$$

    where $W c_i$ are P vectors that the block's tokens see before themselves. So a token sees those of its block by f, and all
    earlier ones through one vector: time O((n / L)^2 D + n (L + P) D) beside the linear layers, and a state of n / L keys a
    layer of G, which runs once in L tokens, f having none beyond a block.

    Args:
        vocab_size: token ids are 0 to vocab_size - 1.
        dim: D, divisible by L.
        block_depth: layers of G.
        token_depth: layers of f; the paper finds as many parameters as in G the best.
        num_heads: heads of both; None takes each mixer's default.
        block_length: L.
        num_prefix: P.
        conditioning: "prefix" as above, or "sum": W c_i are L vectors that are added to those of the block.
        mixer: a registered mixer for G.
        mixer_options: its options; rotary positions for softmax attention by default.
        token_mixer: one for f; by default that of G, with its options.
        token_options: its options.
        channel_mixer: a registered channel mixer, or None for none.
        channel_options: its own options.
        norm: norm of the blocks and behind both decoders.
        tie_embeddings: the head is E transposed.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: for a mixer that cannot be causal.
        ValueError: for sizes out of their range, or an unknown conditioning.

    Differs from the paper: BOS and the pads are learned vectors. A masked token is as if it were not there: real ones move
    together before blocks are cut. Embedders that are encoders, conditioning by cross-attention, and training with padding of
    random length (pad on the left by real tokens of your choice) are not here.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        block_depth: int,
        token_depth: int,
        num_heads: int | None = None,
        *,
        block_length: int = 4,
        num_prefix: int = 2,
        conditioning: str = "prefix",
        mixer: str = "softmax",
        mixer_options: Mapping[str, Any] | None = None,
        token_mixer: str | None = None,
        token_options: Mapping[str, Any] | None = None,
        channel_mixer: str | None = "mlp",
        channel_options: Mapping[str, Any] | None = None,
        norm: str = "layer_norm",
        tie_embeddings: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning: expected one of {CONDITIONINGS}, got {conditioning!r}")
        if block_length < 1 or dim % block_length:
            raise ValueError(f"block_length: expected a divisor of dim={dim}, got {block_length}")
        if num_prefix < 1:
            raise ValueError(f"num_prefix: expected at least 1, got {num_prefix}")
        own: Mapping[str, Any] = {"position": "rotary"} if mixer == "softmax" else {}
        own = own if mixer_options is None else mixer_options
        fine = own if token_mixer is None and token_options is None else token_options or {}
        options = BlockOptions(channel_mixer, channel_options or {}, norm)
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        def stack(name: str, options_of: Mapping[str, Any], depth: int) -> nn.ModuleList:
            require_causal(name)
            return build_blocks(dim, layer_schedule(depth, name, options_of), options, causal=True, num_heads=num_heads, **place)

        self.dim, self.block_length, self.conditioning = dim, block_length, conditioning
        self.num_prefix = num_prefix if conditioning == "prefix" else 0
        self.lookup = nn.Embedding(vocab_size, dim // block_length, **place)
        self.embedding = nn.Embedding(vocab_size, dim, **place)
        self.pad, self.begin = nn.Parameter(torch.empty(dim // block_length, **place)), nn.Parameter(torch.empty(dim, **place))
        for values in (self.lookup.weight, self.embedding.weight, self.pad, self.begin):
            nn.init.normal_(values, std=dim**-0.5)
        self.blocks = stack(mixer, own, block_depth)
        self.expand = nn.Linear(dim, (self.num_prefix or block_length) * dim, **place)
        self.token_blocks = stack(token_mixer or mixer, fine, token_depth)
        self.block_norm, self.norm = (create_norm(norm, dim, causal=True, **place) for _ in range(2))
        self.head = None if tie_embeddings else nn.Linear(dim, vocab_size, bias=False, **place)

    @property
    def streams(self) -> bool:
        """Whether `init_state` and `extend` work: the block decoder streams."""
        return all(block.streams for block in self._layers())

    def forward(self, tokens: Int[Tensor, "b n"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n v"]:
        """Logits of the next token at every token, from the tokens up to it alone.

        Args:
            tokens: ids, (batch, n).
            mask: (batch, n), True marks a real token; what the logits are at the others means nothing.
        """
        check_mask("mask", mask, tuple(tokens.shape))
        if mask is None:
            return self._logits(tokens, self._contexts(self._first(tokens), None), None)
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)  # real tokens together, in their order
        ids, real = tokens.gather(1, order), mask.gather(1, order)
        logits = self._logits(ids, self._contexts(self._first(ids), real[:, :: self.block_length]), real)
        return torch.zeros_like(logits).scatter(1, order.unsqueeze(-1).expand_as(logits), logits)

    def init_state(self, batch_size: int) -> State:
        """The state before the first token: that of the block decoder, the last context, and the ids since the last block began.

        Raises:
            UnsupportedError: if the block decoder's mixer does not stream.
        """
        tensors: dict[str, Tensor] = {}
        for index, block in enumerate(self._layers()):
            tensors.update(block.init_state(batch_size).prefixed(f"blocks.{index}."))
        none = torch.zeros(batch_size, 0, dtype=torch.int64, device=self.begin.device)
        return State({**tensors, "context": self.begin.new_zeros(batch_size, 0, self.dim), "ids": none})

    def extend(self, tokens: Int[Tensor, "b n"], state: State) -> tuple[Float[Tensor, "b n v"], State]:
        """The next n >= 1 tokens: piece by piece this gives what `forward` gives at once.

        Args:
            tokens: the next ids, (batch, n).
            state: what `init_state` or the last call returned; it is not changed.

        Returns:
            Logits (batch, n, vocab_size) and the state after these tokens.
        """
        kept, length = state["ids"].shape[1], self.block_length
        ids = torch.cat((state["ids"], tokens), 1)
        # The kept ids begin with the one that ended the last block: what follows is of the next one.
        rows = self._blocks(ids[:, 1:]) if kept else self._first(ids)
        after, context = dict(state), state["context"]
        if rows.shape[1]:
            for index, block in enumerate(self._layers()):
                prefix = f"blocks.{index}."
                rows, part = block.extend(rows, state.part(prefix))
                after.update(part.prefixed(prefix))
            context = torch.cat((context, self.block_norm(rows)), 1)
        logits = self._logits(ids, context, None)[:, kept:]
        begin = (ids.shape[1] - 1) // length * length
        return logits, State({**after, "context": context[:, -1:], "ids": ids[:, begin:]})

    def generate(
        self,
        prompt: Int[Tensor, "b n"],
        num_tokens: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b m"]:
        """Sample a continuation token by token; as `CausalLM.generate`."""
        return generate(cast("CausalLM", self), prompt, num_tokens, temperature=temperature, generator=generator)

    def _first(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b t c"]:
        """The embedded blocks of a sequence, behind the pads, without those that are not whole."""
        return self._blocks(ids, self.pad.expand(len(ids), self.block_length - 1, -1))

    def _blocks(self, ids: Int[Tensor, "b n"], before: Tensor | None = None) -> Float[Tensor, "b t c"]:
        """The embedded blocks of ids, without the last if it is not whole."""
        x = self.lookup(ids) if before is None else torch.cat((before, self.lookup(ids)), 1)
        count = x.shape[1] // self.block_length
        return rearrange(x[:, : count * self.block_length], "b (t l) c -> b t (l c)", l=self.block_length)

    def _contexts(self, x: Float[Tensor, "b t c"], real: Bool[Tensor, "b t"] | None) -> Float[Tensor, "b t c"]:
        """What the block decoder makes of embedded blocks."""
        carried = Tokens(zero_masked(x, real), real)
        for block in self.blocks:
            carried = block(carried)
        return self.block_norm(carried.x, real)

    def _logits(
        self, ids: Int[Tensor, "b n"], contexts: Float[Tensor, "b t c"], real: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n v"]:
        """The token decoder in every block: at each id that of the next, where context i stands for ids from i L on."""
        (b, n), length, prefix = ids.shape, self.block_length, self.num_prefix
        extra = contexts.shape[1] * length - n
        x = F.pad(self.embedding(ids), (0, 0, 0, extra)).reshape(-1, length, self.dim)
        x = torch.cat((self.begin.expand(len(x), 1, -1), x[:, 1:]), 1)
        given = self.expand(contexts).reshape(len(x), -1, self.dim)
        x = torch.cat((given, x), 1) if prefix else x + given
        if real is not None:
            real = F.pad(real, (0, extra)).reshape(-1, length)
            real = torch.cat((real[:, :1].expand(-1, prefix), real), 1)  # a block that has any token has its first
        carried = Tokens(zero_masked(x, real), real)
        for block in self.token_blocks:
            carried = block(carried)
        hidden = self.norm(carried.x[:, prefix:]).reshape(b, -1, self.dim)[:, :n]
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def _layers(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))
