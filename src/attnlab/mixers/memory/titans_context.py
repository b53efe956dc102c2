"""Titans with memory as context: attention over a segment and what the memory recalls for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks, causal_pairs, zero_masked
from attnlab.core.state import State
from attnlab.mixers.memory.base import MEMORY, MemoryMixer, MemoryOptions, persistent_tokens, placed
from attnlab.mixers.memory.gated_product import GatedProduct
from attnlab.mixers.memory.neural_memory import ConvolvedProjection, unpack
from attnlab.mixers.memory.real_tokens import align
from attnlab.ops.attention import attention
from attnlab.ops.neural_memory import Alignment, Weights, read_memory

_CACHED = ("recalled_keys", "recalled_values", "own_keys", "own_values")


class _Piece(NamedTuple):
    """What the tokens of a segment bring: queries, queries for recall, keys and values of their own in the segment's slots."""

    q: Float[Tensor, "b h m d"]
    recall: Float[Tensor, "b e m f"]
    k: Float[Tensor, "b h s d"]
    v: Float[Tensor, "b h s d"]


@mixers.register(
    "titans_mac", family="memory", paper="titans", supports=MEMORY, example={"chunk": 2, "segment": 4, "num_persistent": 3}
)
class TitansContext(MemoryMixer):
    r"""Memory as context (Behrouz et al. 2025, section 4.1, MAC).

    The sequence is cut into segments of C tokens. For token t of a segment, with persistent tokens $P$, the memory
    $\bar M$ at the beginning of the segment, and $M_t$ after the update with $y_t$,

    $$h_t = \bar M(\mathrm{q}(x_t)), \qquad y_t = \mathrm{Attn}(x_t;\, [P \,\|\, h_{\le t} \,\|\, x_{\le t}]), \qquad
    o_t = W_o(y_t \otimes M_t(y_t)),$$

    $\otimes$ that of `titans_mag`, and the memory's own queries, keys and values linear maps of $y$ as `NeuralMemory` has them.
    Keys and values of h are those of tokens. Time that of `titans` and O(n (p + C) d). State: that of `titans`, the weights of
    $\bar M$, and the keys and values of C tokens and of what was recalled for them.

    Args:
        dim: width of the tokens.
        num_heads: heads of the attention.
        segment: C, tokens of a segment.
        num_persistent: p, persistent tokens.
        gate: sigma of the product: "silu", "sigmoid" or "tanh".
        **options: those of `MemoryMixer`.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an option out of its range.

    Differs from the paper, where all of a segment's h stand before its tokens, so that its first token would see what was
    recalled for its last: here h is seen from its own token on. There the memory that the output reads was updated by the whole
    segment; here by the tokens up to the one that reads. Both are what causality asks for. Open there, and chosen here: what
    `titans_mag` names, and queries of their own for h. A masked token takes no place in a segment.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        segment: int = 128,
        num_persistent: int = 4,
        gate: str = "silu",
        **options: Unpack[MemoryOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if segment < 1:
            raise ValueError(f"segment: expected at least 1, got {segment}")
        place = placed(options)
        self.segment = segment
        self.persistent = persistent_tokens(num_persistent, dim, **place)
        self.recall = ConvolvedProjection(dim, self.store.num_heads, options.get("conv_size", 4), normalize=True, **place)
        self.q_proj = nn.Linear(dim, dim, bias=False, **place)
        self.k_proj = nn.Linear(dim, dim, bias=False, **place)
        self.v_proj = nn.Linear(dim, dim, bias=False, **place)
        self.product = GatedProduct(dim, gate, **place)
        self.out_proj = nn.Linear(dim, dim, bias=False, **place)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The learned first memory, and an empty segment."""
        state = self.store.begin(batch_size, device, dtype)
        shape = (batch_size, self.num_heads, self.segment, self.dim // self.num_heads)
        return State(
            {
                **state.prefixed("store."),
                **{f"recalled.{i}": w for i, w in enumerate(unpack(state).memory)},
                **{name: torch.zeros(shape, device=device, dtype=dtype) for name in _CACHED},
                "window": self.recall.begin(batch_size, device, dtype),
                "segment_place": torch.zeros(batch_size, device=device, dtype=torch.int64),
            }
        )

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Segment by segment; with a mask every example has segments of its own, as in a stream."""
        if masks.query is not None:
            return super().mix(x, context, masks, grid)
        whole, _ = self._project(x, self.recall.begin(x.shape[0], x.device, x.dtype), None)
        state = self.store.begin(x.shape[0], x.device, x.dtype)
        outputs = []
        pieces = (_Piece(*parts) for parts in zip(*(t.split(self.segment, 2) for t in whole), strict=True))
        for index, piece in enumerate(pieces):
            keys, values = self._heads_of(read_memory(piece.recall, unpack(state).memory, activation=self.store.activation))
            size = piece.q.shape[2]
            y = self._attend(piece, keys, values, causal_pairs(size, size, x.device)[None, None], None)
            o, state = self._gate(y, state, None, index * self.segment % self.store.chunk)
            outputs.append(o)
        return torch.cat(outputs, 1)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Fill the segments that are begun, each example at its own place."""
        n, size, place = x.shape[1], self.segment, state["segment_place"]
        whole, window = self._project(x, state["window"], mask)
        aligned = Alignment.of(place, mask, n, size)
        total, step = place + aligned.count, n == 1
        slots = torch.arange(aligned.length, device=x.device)
        known, live = slots[:size] < place[:, None], aligned.live
        # A single token asks alone; the keys and values of a segment always have all its slots.
        whole = _Piece(*(t if step and i < 2 else aligned.spread(t) for i, t in enumerate(whole)))
        memory, recalled = state.part("store."), tuple(state.part("recalled.").values())
        cached = {name: state[name] for name in _CACHED}
        outputs = []
        pieces = (_Piece(*parts) for parts in zip(*(t.split(size, 2) for t in whole), strict=True))
        for index, piece in enumerate(pieces):
            reached = total > index * size  # examples that have a token here; the others stay where they ended
            begins = reached & (place == 0) if index == 0 else reached
            recalled = _where(begins, unpack(memory).memory, recalled)
            read = self._heads_of(read_memory(piece.recall, recalled, activation=self.store.activation))
            fresh = (*(aligned.spread(t) if step else t for t in read), piece.k, piece.v)
            if index == 0:  # the slots that earlier tokens filled
                fresh = _where(known, tuple(cached.values()), fresh, tokens=True)
            keys, values, own_keys, own_values = fresh
            there = slots[index * size : (index + 1) * size]
            pairs = slots[:size] <= (place[:, None, None, None] if step else slots[:size, None])
            filled = there < total[:, None]
            y = self._attend(piece._replace(k=own_keys, v=own_values), keys, values, pairs.expand(len(x), 1, -1, -1), filled)
            mine = mask if step else live[:, index * size : (index + 1) * size]
            o, memory = self._gate(zero_masked(y, mine), memory, mine, None)
            outputs.append(o)
            cached = dict(zip(_CACHED, fresh if index == 0 else _where(reached, fresh, tuple(cached.values())), strict=True))
        y = torch.cat(outputs, 1)
        y = y if step else aligned.collect(y[:, None])[:, 0]
        after = {f"recalled.{i}": w for i, w in enumerate(recalled)}
        return y, State({**memory.prefixed("store."), **after, **cached, "window": window, "segment_place": total % size})

    def _project(
        self, x: Float[Tensor, "b n c"], window: Tensor, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[_Piece, Float[Tensor, "b w1 c"]]:
        recall, window = self.recall(x, window, align(mask))
        q = rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.num_heads)
        return _Piece(q, recall, *self._heads_of(x[:, None])), window

    def _heads_of(self, x: Float[Tensor, "b e m f"]) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]]:
        """Keys and values of tokens whose width stands in e heads."""
        tokens = rearrange(x, "b e m f -> b m (e f)")
        k, v = (rearrange(proj(tokens), "b m (h d) -> b h m d", h=self.num_heads) for proj in (self.k_proj, self.v_proj))
        return k, v

    def _attend(
        self,
        piece: _Piece,
        recalled_keys: Float[Tensor, "b h s d"],
        recalled_values: Float[Tensor, "b h s d"],
        pairs: Bool[Tensor, "#b 1 m s"],
        filled: Bool[Tensor, "b s"] | None,
    ) -> Float[Tensor, "b m c"]:
        """Queries of a segment over persistent, recalled and own tokens."""
        keys, values, allowed = [recalled_keys, piece.k], [recalled_values, piece.v], [pairs, pairs]
        real = [] if filled is None else [filled, filled]
        if self.persistent is not None:
            k, v = (t.expand(len(piece.q), -1, -1, -1) for t in self._heads_of(self.persistent[None, None]))
            keys, values = [k, *keys], [v, *values]
            allowed = [pairs.new_ones(*pairs.shape[:3], k.shape[2]), *allowed]
            real = [] if filled is None else [filled.new_ones(len(filled), k.shape[2]), *real]
        y = attention(
            piece.q,
            torch.cat(keys, 2),
            torch.cat(values, 2),
            pair_mask=torch.cat(allowed, -1),
            key_mask=torch.cat(real, 1) if real else None,
        )
        return rearrange(y, "b h m d -> b m (h d)")

    def _gate(
        self, y: Float[Tensor, "b m c"], state: State, mask: Bool[Tensor, "b m"] | None, place: int | None
    ) -> tuple[Float[Tensor, "b m c"], State]:
        """Write y, read with it, multiply, project."""
        heads, state = self.store(y, state, mask, place)
        self.emit("read", heads)
        return self.out_proj(self.product(y, rearrange(heads, "b h m d -> b m (h d)"))), state


def _where(turn: Bool[Tensor, "b *s"], new: Weights, old: Weights, *, tokens: bool = False) -> Weights:
    """``new`` for the examples, or the tokens of examples, of the turn, ``old`` for the others."""
    turn = turn[:, None, :, None] if tokens else turn[:, None, None, None]
    return tuple(torch.where(turn, a, b) for a, b in zip(new, old, strict=True))
