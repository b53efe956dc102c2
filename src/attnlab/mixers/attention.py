"""What mixers of the form "project to queries, keys and values, attend, project back" share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, token_positions
from attnlab.core.state import Before, State
from attnlab.core.streaming import StreamingMixer
from attnlab.ops.attention import Normalizer, Pairwise, attention
from attnlab.positions import create_position

# What attention over explicit pairs of query and key promises.
DENSE = Supports(
    causal="optional",
    cross=True,
    pair_mask=True,
    streaming=True,
    grid=frozenset({1, 2, 3}),
    mixing_matrix=True,
    permutation_equivariant=True,
    state="grows",
    cost=2.0,
)


# What a `CachedAttention` promises beside: the keys of two pieces are those of the one and those of the other.
CACHED = replace(DENSE, associative=True)


class AttentionOptions(TypedDict, total=False):
    """The options of `AttentionMixer` that a subclass hands on unchanged."""

    causal: bool
    num_kv_heads: int | None
    head_dim: int | None
    context_dim: int | None
    qkv_bias: bool
    out_bias: bool
    qk_norm: str
    position: str
    position_options: Mapping[str, Any] | None
    device: torch.device | None
    dtype: torch.dtype | None


class AttentionMixer(Mixer):
    """Queries, keys and values of several heads, an operator on them, an output projection.

    The operator is softmax attention; a subclass may exchange `attend`, which must be linear in the values: the mixing matrix is
    what it makes of the identity.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        causal: see `Mixer`.
        num_kv_heads: key and value heads, a divisor of ``num_heads``: all for multi-head, 1 for multi-query attention.
        head_dim: width of a head; by default dim / num_heads.
        context_dim: width of ``context``; by default ``dim``.
        qkv_bias: biases in the three input projections.
        out_bias: bias in the output projection.
        qk_norm: "none", or "layer_norm" over the width of each query and key head, before positions.
        position: name of a registered position, for self-attention alone.
        position_options: the position's own options.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = True,
        qk_norm: str = "none",
        position: str = "none",
        position_options: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}")
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.context_dim = dim if context_dim is None else context_dim
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, inner_kv = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=qkv_bias, **place)
        self.k_proj = nn.Linear(self.context_dim, inner_kv, bias=qkv_bias, **place)
        self.v_proj = nn.Linear(self.context_dim, inner_kv, bias=qkv_bias, **place)
        self.out_proj = nn.Linear(inner, dim, bias=out_bias, **place)
        if qk_norm not in ("none", "layer_norm"):
            raise ValueError(f"qk_norm: expected 'none' or 'layer_norm', got {qk_norm!r}")
        norm = nn.LayerNorm if qk_norm == "layer_norm" else nn.Identity
        self.q_norm, self.k_norm = norm(self.head_dim, **place), norm(self.head_dim, **place)
        self.position_name = position
        self.position = create_position(position, num_heads, self.head_dim, position_options).to(**place)
        if causal and self.position.reads_future:
            raise self._refusal(f"causal=True with position={position!r}", "that position mixes in later tokens by itself")

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the allowed keys. The last query stands at the last key where causal."""
        return self.dense(q, k, v, masks, grid)

    def weigh_heads(
        self, heads: Float[Tensor, "b h n e"], x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b h n e"]:
        """A factor a head and token before the output projection; nothing here."""
        return heads

    def dense(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
        *,
        scale: float | None = None,
        bias: Float[Tensor, "#b #h #n #m"] | None = None,
        heat: float = 1.0,
        normalizer: str | Normalizer = "softmax",
    ) -> Float[Tensor, "b h n e"]:
        """`attnlab.ops.attention.attention` with this mixer's causality and position.

        ``bias`` comes on top of the position's, which is multiplied by ``heat``.
        """
        num_keys = k.shape[2]
        term = self.position.bias(q, num_keys, causal=self.causal, grid=grid)
        if heat != 1.0:
            term = Pairwise.of(term).scaled(heat)
        if bias is not None:
            term = Pairwise.of(term).plus(bias)
        return attention(
            q,
            k,
            v,
            scale=scale,
            bias=term,
            factor=self.position.factor(q, num_keys, causal=self.causal, grid=grid),
            causal=self.causal,
            key_mask=masks.key,
            pair_mask=masks.pair,
            normalizer=normalizer,
        )

    def project(
        self, x: Float[Tensor, "b n c"], context: Tensor | None = None, index: Int[Tensor, "#b n"] | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hk m d"], Float[Tensor, "b hk m d"]]:
        """Queries, keys and values, with positions in queries and keys in self-attention; ``index`` counts from 0 by default."""
        if context is not None and self.position_name != "none":
            raise self._refusal(f"context with position={self.position_name!r}", "two sequences have no common positions")
        source = x if context is None else context
        q = self.q_norm(rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.num_heads))
        k = self.k_norm(rearrange(self.k_proj(source), "b m (h d) -> b h m d", h=self.num_kv_heads))
        v = rearrange(self.v_proj(source), "b m (h d) -> b h m d", h=self.num_kv_heads)
        if context is None:
            index = torch.arange(x.shape[1], device=x.device)[None] if index is None else index
            q, k = self.position.encode(q, index), self.position.encode(k, index)
        return q, k, v

    def place(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Int[Tensor, "#b n"]:
        """The index of each token of a whole sequence, among the real ones where the position wants that."""
        return token_positions(*x.shape[:2], mask if self.position.skips_padding else None, device=x.device)

    def join(
        self, heads: Float[Tensor, "b h n e"], x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n c"]:
        """Heads back to tokens."""
        return self.out_proj(rearrange(self.weigh_heads(heads, x, mask), "b h n e -> b n (h e)"))

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Project, attend, project back."""
        q, k, v = self.project(x, context, self.place(x, masks.query))
        heads = self.attend(q, k, v, masks, grid)
        self.show(q, k, v, heads, masks, grid)
        return self.join(self._with_local(heads, v, grid, masks.key), x, masks.query)

    def mix_packed(self, x: Float[Tensor, "t c"], lengths: Sequence[int]) -> Float[Tensor, "t c"]:
        """All projections at once, attention a sequence at a time; a subclass with another `mix` gets the plain form."""
        if type(self).mix is not AttentionMixer.mix:
            return super().mix_packed(x, lengths)
        tokens = x[None]
        index = torch.cat([torch.arange(n, device=x.device) for n in lengths])[None]
        parts = [t.split(list(lengths), dim=2) for t in self.project(tokens, index=index)]
        heads = []
        for q, k, v in zip(*parts, strict=True):
            grid = (q.shape[2],)
            heads.append(self._with_local(self.attend(q, k, v, Masks(), grid), v, grid, None))
        return self.join(torch.cat(heads, dim=2), tokens, None)[0]

    def _with_local(
        self, heads: Float[Tensor, "b h n e"], v: Float[Tensor, "b hk m e"], grid: Grid | None, mask: Tensor | None
    ) -> Float[Tensor, "b h n e"]:
        """The head outputs and what the position adds to them from the values around."""
        if not self.position.reads_values:
            return heads
        return heads + self.position.local(v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1), grid, mask)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What `attend` makes of identity values."""
        q, k, _ = self.project(x, context, self.place(x, masks.query))
        return self.attend(q, k, self.identity(k), masks, grid)

    def show(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        heads: Float[Tensor, "b h n e"],
        masks: Masks,
        grid: Grid | None,
    ) -> None:
        """Emit "values", "mixed" and, if anyone wants it, the map between them, "attention"."""
        self.emit("values", lambda: v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1))
        self.emit("mixed", heads)
        self.emit("attention", lambda: self.attend(q, k, self.identity(k), masks, grid))

    @staticmethod
    def identity(k: Float[Tensor, "b hk m d"]) -> Float[Tensor, "b hk m m"]:
        """Values whose mix is the map itself."""
        return torch.eye(k.shape[2], device=k.device, dtype=k.dtype).expand(*k.shape[:2], -1, -1)


class CachedAttention(AttentionMixer, StreamingMixer):
    """An `AttentionMixer` that streams by keeping keys and values: all of them, or those that `trim` leaves.

    State: ``k``, ``v`` (b, hk, m, d), ``position`` (b,), and ``real`` (b, m), which is (b, 0) as long as no mask was given.
    What a piece leaves is its own keys and values; two pieces' stand one behind the other, in the order of the text.
    """

    memory = ("k", "v", "real")

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No keys yet."""
        empty = torch.zeros(batch_size, self.num_kv_heads, 0, self.head_dim, device=device, dtype=dtype)
        return State(
            {
                "k": empty,
                "v": empty.clone(),
                "real": torch.ones(batch_size, 0, device=device, dtype=torch.bool),
                "position": torch.zeros(batch_size, device=device, dtype=torch.int64),
            }
        )

    def trim(self, state: State) -> State:
        """The state without keys that no later query can need; all are kept here."""
        return state

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Attend over the kept keys and the new ones."""
        n, kept = x.shape[1], state["k"].shape[2]
        counted = mask if self.position.skips_padding else None
        q, k, v = self.project(x, index=self._index(x, state, mask))
        after = state.grow(2, k=k, v=v)
        real = state["real"]
        if mask is not None or real.shape[1]:
            past = real if real.shape[1] == kept else real.new_ones(x.shape[0], kept)
            real = torch.cat((past, real.new_ones(x.shape[0], n) if mask is None else mask), dim=1)
        heads = self.attend(q, after["k"], after["v"], Masks(mask, real if real.shape[1] else None), None)
        after = self.trim(after.replace(real=real, position=state["position"] + (n if counted is None else counted.sum(dim=1))))
        return self.join(heads, x, mask), after

    def place_of(self, before: Before) -> Int[Tensor, "b"]:
        """Real tokens alone where the position counts these."""
        return before.real if self.position.skips_padding else before.count

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        """Keys and values of the piece, those that `trim` leaves."""
        _, k, v = self.project(x, index=self._index(x, state, mask))
        real = k.new_ones(x.shape[0], 0, dtype=torch.bool) if mask is None else mask
        return self.trim(State({"k": k, "v": v, "real": real}))

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """Keys and values of both, those that `trim` leaves."""
        joined = {name: torch.cat((earlier[name], later[name]), dim=2) for name in ("k", "v")}
        masked = [part["real"].shape[1] > 0 for part in (earlier, later)]
        real = [
            part["real"] if known or not any(masked) else part["real"].new_ones(part["k"].shape[0], part["k"].shape[2])
            for part, known in zip((earlier, later), masked, strict=True)
        ]
        return dict(self.trim(State({**joined, "real": torch.cat(real, dim=1)})))

    def _index(self, x: Tensor, state: State, mask: Tensor | None) -> Int[Tensor, "#b n"]:
        """Positions of the tokens that come after ``state``."""
        counted = mask if self.position.skips_padding else None
        return token_positions(*x.shape[:2], counted, start=state["position"], device=x.device)
