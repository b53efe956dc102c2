"""Titans with memory as a layer: the neural memory, and window attention over what it reads."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.state import State
from attnlab.mixers.memory.base import MEMORY, MemoryOptions, for_batch, persistent_tokens, placed
from attnlab.mixers.memory.titans import Titans
from attnlab.mixers.memory.window import Cache, WindowAttention


@mixers.register(
    "titans_mal", family="memory", paper="titans", supports=MEMORY, example={"chunk": 4, "window": 4, "num_persistent": 3}
)
class TitansLayer(Titans):
    r"""Memory as a layer (Behrouz et al. 2025, section 4.3, MAL).

    With persistent tokens $P$ and the layer $M$ of `titans`, its norm, gate and projection included,

    $$y = M([P \,\|\, x]), \qquad o = W_o\, \mathrm{SWA}(y) .$$

    Queries see the last w of the y, those of $P$ only as long as they are among these. Time that of `titans` and O(n w d). State:
    that of `titans`, and the keys and values of w - 1 tokens.

    Args:
        dim: width of the tokens.
        num_heads: heads of the attention.
        window: w, tokens that a query sees, its own among them.
        num_persistent: persistent tokens.
        **options: those of `MemoryMixer`.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an option out of its range.

    Differs from the paper, which leaves open what `titans` and `titans_mag` name. Nothing is added to the memory's output before
    the attention. A masked token takes no place in a window.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window: int = 256,
        num_persistent: int = 4,
        **options: Unpack[MemoryOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        place = placed(options)
        self.persistent = persistent_tokens(num_persistent, dim, **place)
        self.attention = WindowAttention(dim, num_heads, window, **place)
        self.attention_proj = nn.Linear(dim, dim, bias=False, **place)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The memory that has written the persistent tokens, and the keys of what it read for them."""
        state, first = self._primed()
        empty, known = self.attention.begin(1, first.k.device, first.k.dtype), first.k.shape[1]
        k, v = torch.cat((empty.k[:, known:], first.k), 1), torch.cat((empty.v[:, known:], first.v), 1)
        real = torch.arange(k.shape[1], device=k.device) >= k.shape[1] - known
        packed = Cache(k, v, real[None]).pack()
        return for_batch(State({**state, **packed}), batch_size, device, dtype)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None, place: int | None = None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Write and read, attend over what was read."""
        y, memory, cache = self._layer(x, state, Cache.unpack(state), mask, place)
        return y, State({**memory, **cache.pack()})

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """The whole sequence after the persistent tokens, with just the keys that there are."""
        state, first = self._primed()
        cache = Cache(first.k.expand(len(x), -1, -1), first.v.expand(len(x), -1, -1), None)
        place = 0 if self.persistent is None else len(self.persistent) % self.store.chunk
        return self._layer(x, for_batch(state, x.shape[0], x.device, x.dtype), cache, masks.query, place)[0]

    def _primed(self) -> tuple[State, Cache]:
        """State and keys after the persistent tokens, for one example."""
        weight = self.out_proj.weight
        state = self.store.begin(1, weight.device, weight.dtype)
        if self.persistent is None:
            return state, self.attention.keep(weight.new_zeros(1, 0, self.dim))
        read, state = super().advance(self.persistent[None], state, mask=None, place=0)
        return state, self.attention.keep(read)

    def _layer(
        self, x: Tensor, state: State, cache: Cache, mask: Tensor | None, place: int | None
    ) -> tuple[Float[Tensor, "b n c"], State, Cache]:
        y, memory = super().advance(x, state, mask=mask, place=place)
        y, cache = self.attention(zero_masked(y, mask), cache, mask)
        return self.attention_proj(y), memory, cache
