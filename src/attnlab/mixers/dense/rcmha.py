"""Relative convolutional attention: short convolutions on queries, keys and values, and scores by offset."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.state import State
from attnlab.mixers.attention import CachedAttention
from attnlab.mixers.parts.short_convolution import ShortConvolution

_PARTS = ("q", "k", "v")


@mixers.register(
    "rcmha",
    family="dense",
    paper="rcmha",
    supports=Supports(causal="optional", streaming=True, mixing_matrix=True, state="grows", cost=2.0),
    example={"max_distance": 16},
)
class RelativeConvolutionalAttention(CachedAttention):
    r"""Attention with causal depthwise convolutions after its projections and relative scores (Sugiharto et al. 2023).

    $$q = \mathrm{DW}_q(x W_q), \quad k = \mathrm{DW}_k(x W_k), \quad v = \mathrm{DW}_v(x W_v + b_v)$$
    $$o_i = \sum_j \mathrm{softmax}_j\!\left(d^{-1/2}\left((q_i + u)^\top k_j + q_i^\top e_{j-i} + \beta_{j-i}\right)\right) v_j$$

    DW convolves along the tokens, w taps of which the last is the current one, with a filter for each channel of a head that
    all heads share (Primer's multi-d-conv-head). $u \in \mathbb{R}^{h \times d}$ meets the keys alone, not the vectors
    $e$ by offset: scores are those of Transformer-XL with learned tables. u, e and $\beta$ are 0 at first. Time O(n m d), memory
    O((n + m) d). State: ``k``, ``v`` (b, hk, m, d) after the convolutions, ``real`` (b, m), and ``window_q``, ``window_k``,
    ``window_v`` (b, h, w - 1, d), the last projections before them.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        causal: of the attention; the convolutions read backwards in any case.
        num_kv_heads: key and value heads, a divisor of ``num_heads``; by default all.
        head_dim: width of a head; by default dim / num_heads.
        conv_size: w.
        max_distance: offsets beyond it share the last entry of e and beta.
        out_bias: bias in the output projection.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a filter or distance below 1, or head counts that do not fit.

    Differs from the paper: tables reach 4096 tokens there and are clipped here; no dropout on the weights; masked tokens enter
    the convolutions as zeros. A mask of pairs is refused: a key has read the two tokens before it, whoever may use those. The
    memory of earlier segments is the streaming state, over which all three convolutions run on; the authors' code starts that
    of the queries anew at each segment.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        conv_size: int = 3,
        max_distance: int = 128,
        out_bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim,
            num_heads,
            causal=causal,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            out_bias=out_bias,
            position="relative",
            position_options={"max_distance": max_distance, "scalars": True},
            **place,
        )
        if conv_size < 1:
            raise ValueError(f"conv_size: expected at least 1, got {conv_size}")
        self.v_proj = nn.Linear(dim, self.num_kv_heads * self.head_dim, **place)
        self.convs = nn.ModuleDict({name: ShortConvolution(self.head_dim, conv_size, bias=True, **place) for name in _PARTS})
        self.query_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim, **place))
        for parameter in self.position.parameters():
            nn.init.zeros_(parameter)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax of the four terms; that of u is a bias of the key."""
        u = self.query_bias.unflatten(0, (self.num_kv_heads, -1))
        of_key = torch.einsum("bkmd,kgd->bkgm", k, u).flatten(1, 2) * self.head_dim**-0.5
        return self.dense(q, k, v, masks, grid, bias=of_key[:, :, None].to(q.dtype))

    def project(
        self, x: Float[Tensor, "b n c"], context: Tensor | None = None, index: Int[Tensor, "#b n"] | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hk m d"], Float[Tensor, "b hk m d"]]:
        """Queries, keys and values after the convolutions, of a sequence without padding from its beginning."""
        q, k, v = self._convolved(x, None, None)[0]
        return q, k, v

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No keys yet, and zeros before the first token."""
        cache = super().begin(batch_size, device, dtype)
        windows = {}
        for name in _PARTS:
            heads = self.num_heads if name == "q" else self.num_kv_heads
            window = self._conv(name).begin(batch_size * heads, device, dtype)
            windows[f"window_{name}"] = window.unflatten(0, (batch_size, heads))
        return State({name: cache[name] for name in ("k", "v", "real")} | windows)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Go on with the convolutions, attend over the kept keys and the new ones."""
        (q, k, v), windows = self._convolved(x, mask, state)
        real = torch.cat((state["real"], state["real"].new_ones(x.shape[:2]) if mask is None else mask), dim=1)
        after = state.grow(2, k=k, v=v).replace(real=real, **windows)
        heads = self.attend(q, after["k"], after["v"], Masks(mask, after["real"]), None)
        return self.join(heads, x, mask), after

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Project, convolve, attend, project back."""
        q, k, v = self._convolved(x, masks.query, None)[0]
        heads = self.attend(q, k, v, masks, grid)
        self.show(q, k, v, heads, masks, grid)
        return self.join(heads, x, masks.query)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The weights of the convolved values."""
        q, k, _ = self._convolved(x, masks.query, None)[0]
        return self.attend(q, k, self.identity(k), masks, grid)

    def _conv(self, name: str) -> ShortConvolution:
        return self.convs[name]  # type: ignore[return-value]

    def _convolved(
        self, x: Tensor, mask: Bool[Tensor, "b n"] | None, state: State | None
    ) -> tuple[list[Float[Tensor, "b h n d"]], dict[str, Tensor]]:
        """Queries, keys and values, and the windows after them; ``state`` None is the beginning."""
        parts, windows = [], {}
        for name, layer in zip(_PARTS, (self.q_proj, self.k_proj, self.v_proj), strict=True):
            # v has a bias, so that zeros at masked tokens are not zeros any more.
            heads = rearrange(zero_masked(layer(x), mask), "b n (h d) -> b h n d", d=self.head_dim)
            window = None if state is None else state[f"window_{name}"].flatten(0, 1)
            y, window = self._conv(name)(heads.flatten(0, 1), window)
            parts.append(y.view(heads.shape))
            windows[f"window_{name}"] = window.unflatten(0, heads.shape[:2])
        return parts, windows
