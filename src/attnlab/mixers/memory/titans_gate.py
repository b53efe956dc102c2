"""Titans with memory as a gate: window attention and neural memory side by side."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.mixers.memory.base import MEMORY, MemoryMixer, MemoryOptions, for_batch, persistent_tokens, placed
from attnlab.mixers.memory.gated_product import GatedProduct
from attnlab.mixers.memory.window import Cache, WindowAttention


@mixers.register(
    "titans_mag", family="memory", paper="titans", supports=MEMORY, example={"chunk": 4, "window": 4, "num_persistent": 3}
)
class TitansGate(MemoryMixer):
    r"""Memory as a gate (Behrouz et al. 2025, section 4.2, MAG).

    With persistent tokens $P$, $\tilde x = [P \,\|\, x]$, the neural memory $M$ (`titans`) and window attention whose queries see
    the last w tokens and always $P$,

    $$o = W_o (\mathrm{SWA}^*(\tilde x) \otimes M(\tilde x)), \qquad
    y \otimes m = \sigma(\mathrm{RMSNorm}(y)) \odot \sigma(\mathrm{RMSNorm}'(m)) .$$

    The memory has written $P$ before the first token: its first state is a function of parameters alone. Time that of `titans`
    and O(n (w + p) d). State: that of `titans`, and the keys and values of w - 1 tokens.

    Args:
        dim: width of the tokens.
        num_heads: heads of the attention.
        window: w, tokens that a query sees, its own among them.
        num_persistent: p, persistent tokens.
        gate: sigma: "silu", "sigmoid" or "tanh".
        **options: those of `MemoryMixer`.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an option out of its range.

    Differs from the paper, which leaves open what `titans` names, the window, p, sigma, and positions in the attention: there
    are none. A masked token takes no place in a window.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window: int = 256,
        num_persistent: int = 4,
        gate: str = "silu",
        **options: Unpack[MemoryOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        place = placed(options)
        self.persistent = persistent_tokens(num_persistent, dim, **place)
        self.attention = WindowAttention(dim, num_heads, window, **place)
        self.product = GatedProduct(dim, gate, **place)
        self.out_proj = nn.Linear(dim, dim, bias=False, **place)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The memory that has written the persistent tokens, and no keys."""
        cache = self.attention.begin(batch_size, device, dtype).pack()
        return State({**self._primed(batch_size, device, dtype), **cache})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Attend, write and read, multiply, project."""
        y, memory, cache = self._both(x, state, Cache.unpack(state), mask, None)
        return y, State({**memory, **cache.pack()})

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """The whole sequence: no keys before it, and its place in the chunk is that after the persistent tokens."""
        state = self._primed(x.shape[0], x.device, x.dtype)
        place = 0 if self.persistent is None else len(self.persistent) % self.store.chunk
        return self._both(x, state, self.attention.keep(x[:, :0]), masks.query, place)[0]

    def _primed(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        if self.persistent is None:
            return self.store.begin(batch_size, device, dtype)
        tokens = self.persistent[None]
        _, state = self.store(tokens, self.store.begin(1, tokens.device, tokens.dtype), None, 0)
        return for_batch(state, batch_size, device, dtype)

    def _both(
        self, x: Tensor, state: State, cache: Cache, mask: Tensor | None, place: int | None
    ) -> tuple[Float[Tensor, "b n c"], State, Cache]:
        heads, memory = self.store(x, state, mask, place)
        y, cache = self.attention(x, cache, mask, self.persistent)
        self.emit("read", heads)
        return self.out_proj(self.product(y, rearrange(heads, "b h n d -> b n (h d)"))), memory, cache
