"""Histogram attention: pixels sorted by value, cut into bins, and attention among the bins of each head's channels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.ops.attention import attention


class Bins(NamedTuple):
    """Where ranks stand in bins, and back.

    Args:
        ranks: (b, f, w), the rank at each place of each bin, -1 for none.
        places: (b, n), the place of each rank among all f w.
    """

    ranks: Int[Tensor, "#b f w"]
    places: Int[Tensor, "#b n"]

    @classmethod
    def of(cls, length: int, count: int, real: Int[Tensor, "#b"], *, contiguous: bool) -> Bins:
        """Bins of the first ``real`` ranks: runs of neighbouring ranks, or every ``count``-th rank."""
        width = -(-length // count)
        bin_, place, real = torch.arange(count).unsqueeze(1), torch.arange(width), real[:, None]
        bin_, place, rank = (t.to(real.device) for t in (bin_, place, torch.arange(length)))
        if not contiguous:
            ranks = (place * count + bin_)[None]
            places = (rank % count) * width + rank // count
            return cls(ranks.masked_fill(ranks >= real.unsqueeze(-1), -1), places[None])
        own = (real + count - 1) // count
        ranks = bin_ * own.unsqueeze(-1) + place
        ranks = ranks.masked_fill((place >= own.unsqueeze(-1)) | (ranks >= real.unsqueeze(-1)), -1)
        full = own.clamp(min=1)
        return cls(ranks, (rank // full * width + rank % full).clamp(max=count * width - 1))

    def split(self, x: Float[Tensor, "b c n"]) -> Float[Tensor, "b c f w"]:
        """Ranked values into bins, zeros where there is none."""
        index = self.ranks.flatten(1)[:, None].expand(*x.shape[:2], -1)
        return x.gather(2, index.clamp(min=0)).masked_fill(index < 0, 0.0).unflatten(2, self.ranks.shape[1:])

    def merge(self, x: Float[Tensor, "b c f w"]) -> Float[Tensor, "b c n"]:
        """The inverse of `split`; what ranks beyond the real ones get means nothing."""
        return x.flatten(2).gather(2, self.places[:, None].expand(*x.shape[:2], -1))


@mixers.register(
    "histogram",
    family="partitioned",
    paper="histoformer",
    supports=Supports(grid=frozenset({2}), discontinuous=True, cost=1.0),
)
class HistogramAttention(Mixer):
    r"""Attention among bins of sorted pixels, in two arrangements (Sun et al. 2024, Histoformer, section 3.2).

    The first half of the channels is sorted along the columns and then along the rows; with a 1 x 1 and a depthwise 3 x 3
    convolution of the whole, $[Q_1, K_1, Q_2, K_2, V]$. Each channel of V is sorted over all pixels, and Q and K are brought in
    its order. A head of d channels, its n ranks cut into f bins, has d f rows of n / f entries, $\hat Q$ and $\hat K$ with rows
    of length 1, and a learned t:

    $$O = A V, \qquad A_{ab} = \frac{\exp(t\, \hat q_a^\top \hat k_b)}{1 + \sum_{b'} \exp(t\, \hat q_a^\top \hat k_{b'})}$$

    Bin-wise ($Q_1, K_1$) a bin is a run of neighbouring ranks, frequency-wise ($Q_2, K_2$) it is every f-th rank. With both
    brought back to their pixels, $Y = W_o (O_1 \odot O_2)$, whose first half of the channels is unsorted at last. Time
    O(n log n C + n C^2 f / h), memory O(n C); there is no matrix between pixels.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always False.
        num_bins: f; the number of heads by default, as the authors have it.
        bias: biases in the convolutions.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=True``, ranks depend on all pixels; for a grid that is no image.
        ValueError: for a number of bins below 1.

    Differs from the paper: masked pixels keep their places while the others are sorted around them, stand in no bin, and bins
    are those of the real pixels alone. Pixels of the same value are in raster order. The input is not changed in place.
    Orders are constants for the gradient, and outputs jump where values change places. There are as many bins as heads: one head
    has a single bin.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        num_bins: int | None = None,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        self.num_bins = num_heads if num_bins is None else num_bins
        if self.num_bins < 1:
            raise ValueError(f"num_bins: expected at least 1, got {num_bins}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.temperature = nn.Parameter(torch.ones(num_heads, **place))
        self.in_proj = nn.Linear(dim, 5 * dim, bias=bias, **place)
        self.conv = nn.Conv2d(5 * dim, 5 * dim, 3, padding=1, groups=5 * dim, bias=bias, **place)
        self.out_proj = nn.Linear(dim, dim, bias=bias, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Sort, convolve, attend among bins in both ways, unsort."""
        mask, half = masks.query, self.dim // 2
        real = None if mask is None else mask.view(-1, 1, *grid)
        image = to_grid(x, grid)
        columns = order(image[:, :half], real, dim=2)
        rows = order(image[:, :half].gather(2, columns), real, dim=3)
        image = torch.cat((image[:, :half].gather(2, columns).gather(3, rows), image[:, half:]), dim=1)
        projected = to_grid(zero_masked(self.in_proj(from_grid(image)), mask), grid)
        q1, k1, q2, k2, v = self.conv(projected).flatten(2).chunk(5, dim=1)
        ranks = order(v, None if mask is None else mask[:, None], dim=2, masked_last=True)
        q1, k1, q2, k2, v = (t.gather(2, ranks) for t in (q1, k1, q2, k2, v))
        count = torch.full((1,), x.shape[1], device=x.device) if mask is None else mask.sum(1)
        product = torch.ones_like(v)
        for q, k, contiguous in ((q1, k1, True), (q2, k2, False)):
            bins = Bins.of(x.shape[1], self.num_bins, count, contiguous=contiguous)
            product = product * bins.merge(self._among(*(bins.split(t) for t in (q, k, v))))
        mixed = torch.zeros_like(product).scatter(2, ranks, product).mT
        y = to_grid(self.out_proj(zero_masked(mixed, mask)), grid)
        first = torch.zeros_like(y[:, :half]).scatter(3, rows, y[:, :half])
        first = torch.zeros_like(first).scatter(2, columns, first)
        return from_grid(torch.cat((first, y[:, half:]), dim=1))

    def _among(
        self, q: Float[Tensor, "b c f w"], k: Float[Tensor, "b c f w"], v: Float[Tensor, "b c f w"]
    ) -> Float[Tensor, "b c f w"]:
        """Rows (channel of the head, bin) attend to each other."""
        q, k, v = (t.reshape(t.shape[0], self.num_heads, -1, t.shape[3]) for t in (q, k, v))
        q, k = (F.normalize(t, dim=-1) for t in (q, k))
        found = attention(q * self.temperature.view(-1, 1, 1), k, v, scale=1.0, normalizer="softmax_plus_one")
        return found.reshape(found.shape[0], self.dim, self.num_bins, found.shape[3])


def order(
    x: Float[Tensor, "b c *s"], real: Bool[Tensor, "b 1 *s"] | None, *, dim: int, masked_last: bool = False
) -> Int[Tensor, "b c *s"]:
    """Which entry along ``dim`` comes to each place where real ones ascend there; equal ones stay in order.

    Args:
        x: values.
        real: True at real ones; None for all.
        dim: along which.
        masked_last: the others come behind the real ones; otherwise each stays where it is.
    """
    x = x.detach()
    if real is None:
        return x.argsort(dim=dim, stable=True)
    ascending = x.masked_fill(~real, float("inf")).argsort(dim=dim, stable=True)
    # An infinite value that is real would stand among the masked ones: bring real ones before them, still in their order.
    real = real.expand_as(x)
    ascending = ascending.gather(dim, (~real.gather(dim, ascending)).to(torch.int8).argsort(dim=dim, stable=True))
    if masked_last:
        return ascending
    holders = (~real).to(torch.int8).argsort(dim=dim, stable=True)  # real places first, each kind in order
    return torch.empty_like(ascending).scatter(dim, holders, ascending)
