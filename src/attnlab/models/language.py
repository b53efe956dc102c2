"""The causal language model around any mixer that can be causal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.masks import check_mask, token_positions, zero_masked
from attnlab.core.state import State
from attnlab.core.tokens import Tokens
from attnlab.mixers.parts.short_convolution import ShortConvolution
from attnlab.models.block import Block
from attnlab.models.embedding import PositionEmbedding
from attnlab.models.norms import create_norm
from attnlab.models.registry import models
from attnlab.models.sampling import generate
from attnlab.models.stack import (
    BlockOptions,
    ChannelOptions,
    MixerNames,
    MixerOptions,
    build_blocks,
    named_schedule,
    require_causal,
)


@models.register("causal_lm")
class CausalLM(nn.Module):
    r"""Token ids to logits of the next token: embedding, blocks, norm, head.

    Masked tokens are seen by no other token and positions are counted over real ones, so that a padded sequence gives at its
    real tokens what it gives alone.

    Args:
        vocab_size: token ids are 0 to vocab_size - 1.
        dim: width of the tokens.
        depth: blocks.
        mixer: a registered mixer, or several names that are repeated in turn over the layers.
        num_heads: heads of those mixers that have some; None takes each mixer's default.
        mixer_options: the mixers' own options: one mapping for all, or one a name; with ``schedule``, by the mixer's name.
        schedule: a registered layer schedule that names the mixers, in place of ``mixer``; see `list_schedules`.
        schedule_options: its own options, such as ``num_full``.
        channel_mixer: a registered channel mixer, or None for none.
        channel_options: its own options, such as ``hidden``: one mapping for all blocks, or one a block.
        norm: norm of the blocks and before the head.
        placement: where the norms stand: "pre", "post" or "sandwich".
        parallel: mixer and channel mixer side by side.
        layer_scale: initial LayerScale, or None.
        drop_path: stochastic depth of the last block, rising linearly over the layers.
        short_conv: taps of a causal depthwise convolution added to the embedded tokens, so that every mixer sees a token's
            neighbours; 0 for none.
        position: "none", "learned" or "sinusoidal".
        max_length: tokens that learned positions reach.
        tie_embeddings: the head is the embedding transposed.
        generator: what stochastic depth draws from.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: for a mixer that cannot be causal; some that can are named.
        UnknownNameError: for a name or option that does not exist.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        mixer: MixerNames = "softmax",
        num_heads: int | None = None,
        *,
        mixer_options: MixerOptions | None = None,
        schedule: str | None = None,
        schedule_options: Mapping[str, Any] | None = None,
        channel_mixer: str | None = "mlp",
        channel_options: ChannelOptions | None = None,
        norm: str = "rms_norm",
        placement: str = "pre",
        parallel: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        short_conv: int = 0,
        position: str = "none",
        max_length: int | None = None,
        tie_embeddings: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = None if device is None else torch.device(device)
        layers = named_schedule(depth, schedule, schedule_options, mixer, mixer_options)
        for name, _ in layers:
            require_causal(name)
        self.vocab_size, self.dim = vocab_size, dim
        self.embedding = nn.Embedding(vocab_size, dim, device=device, dtype=dtype)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.short_conv = ShortConvolution(dim, short_conv, device=device, dtype=dtype) if short_conv else None
        self.position = PositionEmbedding(position, dim, max_length, std=dim**-0.5, device=device, dtype=dtype)
        options = BlockOptions(channel_mixer, channel_options or {}, norm, placement, parallel, layer_scale, drop_path, generator)
        self.blocks = build_blocks(dim, layers, options, causal=True, num_heads=num_heads, device=device, dtype=dtype)
        self.norm = create_norm("none" if placement == "post" else norm, dim, causal=True, device=device, dtype=dtype)
        self.head = None if tie_embeddings else nn.Linear(dim, vocab_size, bias=False, device=device, dtype=dtype)

    @property
    def streams(self) -> bool:
        """Whether `init_state` and `extend` work: every block streams."""
        return all(block.streams for block in self._layers())

    def forward(self, tokens: Int[Tensor, "b n"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n v"]:
        """Logits of the next token at every token.

        Args:
            tokens: ids, (batch, n).
            mask: (batch, n), True marks a real token; what the logits are at the others means nothing.
        """
        check_mask("mask", mask, tuple(tokens.shape))
        self.position.check_length(tokens.shape[1])
        positions = token_positions(*tokens.shape, mask, device=tokens.device)
        carried = Tokens(self.position(self._embed(tokens, mask)[0], positions), mask)
        for block in self.blocks:
            carried = block(carried)
        return self._logits(carried.x, mask)

    def init_state(self, batch_size: int) -> State:
        """The state before the first token.

        Raises:
            UnsupportedError: if a mixer does not stream.
        """
        tensors: dict[str, Tensor] = {}
        for index, block in enumerate(self._layers()):
            tensors.update(block.init_state(batch_size).prefixed(f"blocks.{index}."))
        weight = self.embedding.weight
        if self.short_conv is not None:
            tensors["window"] = self.short_conv.begin(batch_size, weight.device, weight.dtype)
        return State({**tensors, "length": torch.zeros(batch_size, dtype=torch.int64, device=weight.device)})

    def extend(
        self, tokens: Int[Tensor, "b n"], state: State, *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n v"], State]:
        """The next n >= 1 tokens: piece by piece this gives what `forward` gives at once.

        Args:
            tokens: the next ids, (batch, n).
            state: what `init_state` or the last call returned; it is not changed.
            mask: (batch, n), True marks a real token.

        Returns:
            Logits (batch, n, vocab_size) and the state after these tokens.
        """
        check_mask("mask", mask, tuple(tokens.shape))
        batch, n = tokens.shape
        length = state["length"]
        if self.position.name == "learned":
            self.position.check_length(int(length.max()) + n)
        positions = token_positions(batch, n, mask, start=length, device=tokens.device)
        x, window = self._embed(tokens, mask, state.get("window"))
        x = self.position(x, positions)
        tensors = {**window, "length": length + (n if mask is None else mask.sum(1))}
        for index, block in enumerate(self._layers()):
            prefix = f"blocks.{index}."
            x, part = block.extend(x, state.part(prefix), mask=mask)
            tensors.update(part.prefixed(prefix))
        return self._logits(x, mask), State(tensors)

    def _embed(
        self, tokens: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None, window: Tensor | None = None
    ) -> tuple[Float[Tensor, "b n c"], dict[str, Tensor]]:
        """Embedded tokens, convolved after those in ``window``, and the next window."""
        x = zero_masked(self.embedding(tokens), mask)
        if self.short_conv is None:
            return x, {}
        y, window = self.short_conv(x, window)
        return x + y, {"window": window}

    def _layers(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _logits(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n v"]:
        x = self.norm(x, mask)
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def generate(
        self,
        prompt: Int[Tensor, "b n"],
        num_tokens: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b m"]:
        """Sample a continuation token by token, with a state where the mixers stream and by running again where they don't.

        Args:
            prompt: ids, (batch, n), n >= 1.
            num_tokens: tokens to add.
            temperature: divides the logits; 0 takes the most likely token.
            generator: what sampling draws from, by default torch's own.

        Returns:
            Prompt and continuation, (batch, n + num_tokens).

        Raises:
            ValueError: for an empty prompt or a negative number or temperature.
        """
        return generate(self, prompt, num_tokens, temperature=temperature, generator=generator)
