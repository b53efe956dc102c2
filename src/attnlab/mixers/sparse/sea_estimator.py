"""SEA's estimators: compressed attention maps out of kernel attention and a small convolutional decoder."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.state import State
from attnlab.mixers.parts.random_features import orthogonal_directions
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.linear_attention import linear_attention

_POSITIVE, _RELU = 1e-4, 1e-3  # what keeps a feature above 0, in the two kernels


class EstimatorOptions(TypedDict, total=False):
    """The options of `Estimator` that a subclass hands on unchanged."""

    factor: float | int
    generator: torch.Generator | None
    device: torch.device | None
    dtype: torch.dtype | None


class Estimate(NamedTuple):
    """What an estimator gives: ``scores`` over the K columns, and ``gates`` in (0, 1) of the attention and of the mean path."""

    scores: Float[Tensor, "b h n c"]
    gates: Float[Tensor, "b h n 2"]

    @property
    def probabilities(self) -> Float[Tensor, "b h n c"]:
        """p, the softmax over columns."""
        return self.scores.softmax(dim=-1)


class Estimator(nn.Module):
    r"""What both estimators share, a head: $e = \mathrm{GELU}(\mathrm{LN}(W_e [c; v]))$ of kernel attention $c$, and maps of e.

    Args:
        num_heads: h.
        head_dim: d.
        columns: K.
        width: of the rows that the decoder begins with, its channels a head times their width.
        factor: d ln d over the number of random directions.
        generator: draws the directions.
    """

    directions: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        columns: int,
        width: int,
        *,
        factor: float | int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim, self.columns = num_heads, head_dim, columns
        count = max(1, int(head_dim * math.log(head_dim) / factor))
        self.register_buffer("directions", orthogonal_directions(count, head_dim, generator=generator, **place))
        self.encode = nn.Linear(3 * head_dim, 2 * head_dim, **place)
        self.norm = nn.LayerNorm(2 * head_dim, **place)
        self.rows = nn.Linear(2 * head_dim, width, **place)
        self.scaler = nn.Linear(2 * head_dim, 2, **place)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Replace the directions by new ones."""
        like = self.directions
        like.copy_(orthogonal_directions(*like.shape, generator=generator, device=like.device, dtype=like.dtype))

    def describe(self, c: Float[Tensor, "b h n d2"], v: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d2"]:
        """e."""
        return F.gelu(self.norm(self.encode(torch.cat((c.to(v.dtype), v), dim=-1))))


class DenseEstimator(Estimator):
    r"""The estimator for whole sequences.

    Kernel attention is Performer's, over values joined by an identity matrix that is stretched along the tokens: what a token
    reads of it says where it looks. With directions w and $\hat x = d^{-1/4} x$,

    $$\phi(x) \propto \left(e^{w^\top \hat x - \lVert\hat x\rVert^2/2 - \max} + 10^{-4}\right), \qquad
      c_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j)\,[I_j; v_j]^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}$$

    (the maximum over directions for a query, and over tokens too for keys). $W_r e$ is four rows of K/2 a head, which
    convolutions over (tokens, columns) turn into one of K: stride 2 along tokens, two layers, stretched by 2, one layer, resized
    to (n, K).
    Options are those of `Estimator` without ``width``.
    """

    def __init__(self, num_heads: int, head_dim: int, columns: int, **options: Unpack[EstimatorOptions]) -> None:
        if columns % 2:
            raise ValueError(f"estimate_dim: expected an even number, got {columns}")
        super().__init__(num_heads, head_dim, columns, 2 * columns, **options)
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        wide = 4 * num_heads
        self.first = nn.Conv2d(wide, wide, 3, padding=1, stride=(2, 1), **place)
        self.second = nn.Conv2d(wide, wide, 3, padding=1, **place)
        self.last = nn.Conv2d(wide, num_heads, 3, padding=1, **place)

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        lengths: Int[Tensor, "b"] | None,
    ) -> Estimate:
        """The estimate; of each example the first ``lengths`` tokens are real, and v is 0 at the others."""
        n = q.shape[2]
        count = torch.full((1,), n, device=q.device) if lengths is None else lengths
        real = torch.arange(n, device=q.device) < count[:, None]
        values = torch.cat((self.places(count, n, v.dtype).expand(len(q), self.num_heads, -1, -1), v), dim=-1)
        return self.decode(self.describe(self.kernel(q, k, values, real), v), count)

    def decode(self, e: Float[Tensor, "b h n d2"], count: Int[Tensor, "#b"]) -> Estimate:
        """Maps and gates out of e, of which the first ``count`` rows are real."""
        n = e.shape[2]
        real = torch.arange(n, device=e.device) < count[:, None]
        maps = self.rows(e).unflatten(-1, (4, -1)).transpose(2, 3).flatten(1, 2)
        half = real[:, ::2]
        maps = self._kept(F.relu(self.first(self._kept(maps, real))), half)
        maps = self._kept(F.relu(self.second(maps)), half)
        scores = self.last(maps.repeat_interleave(2, dim=2))
        scores = F.interpolate(scores, (scores.shape[2], self.columns), mode="bilinear", align_corners=False)
        return Estimate(self._fit(scores, count, n), self.scaler(e).sigmoid())

    def places(self, count: Int[Tensor, "b"], n: int, dtype: torch.dtype) -> Float[Tensor, "b 1 n d"]:
        """Rows of the identity matrix, interpolated so that the first and the last token have the first and the last."""
        index = torch.arange(n, device=count.device, dtype=accumulate_dtype(dtype))
        places = index * (self.head_dim - 1) / (count[:, None] - 1).clamp(min=1)
        gaps = places[..., None] - torch.arange(self.head_dim, device=count.device)
        return (1.0 - gaps.abs()).clamp(min=0.0).to(dtype)[:, None]

    def kernel(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        values: Float[Tensor, "b h n e"],
        real: Bool[Tensor, "#b n"],
    ) -> Float[Tensor, "b h n e"]:
        """c: the mean of the real tokens' values by products of features."""
        logits, halves = [], []
        for x in (q * self.head_dim**-0.25, k * self.head_dim**-0.25):
            logits.append(x @ self.directions.to(x.dtype).mT)
            halves.append(x.square().sum(-1, keepdim=True) / 2)
        there = real[:, None, :, None]
        peak_q = logits[0].detach().amax(-1, keepdim=True)
        peak_k = logits[1].detach().masked_fill(~there, float("-inf")).amax((-1, -2), keepdim=True)
        peaks = (peak_q, peak_k.masked_fill(peak_k == float("-inf"), 0.0))
        parts = zip(logits, halves, peaks, strict=True)
        read, written = ((a - half - peak).exp() + _POSITIVE for a, half, peak in parts)
        sums = F.pad(values, (0, 1), value=1.0)
        mixed, _ = linear_attention(read, written.masked_fill(~there, 0.0), sums, causal=False)
        return mixed[..., :-1] / mixed[..., -1:].masked_fill(mixed[..., -1:] == 0, 1.0)

    @staticmethod
    def _kept(maps: Float[Tensor, "b c n w"], real: Bool[Tensor, "#b n"]) -> Float[Tensor, "b c n w"]:
        return maps.masked_fill(~real[:, None, :, None], 0.0)

    @staticmethod
    def _fit(scores: Float[Tensor, "b h m c"], count: Int[Tensor, "#b"], n: int) -> Float[Tensor, "b h n c"]:
        """Rows of the first ``2 ceil(count / 2)`` interpolated to ``count``, corners not aligned."""
        have = (count + 1) // 2 * 2
        index = torch.arange(n, device=count.device, dtype=accumulate_dtype(scores.dtype))
        place = ((index + 0.5) * (have.to(index.dtype) / count)[:, None] - 0.5).clamp(min=0.0)
        low = place.floor()
        last = torch.minimum(have - 1, torch.tensor(scores.shape[2] - 1, device=count.device))[:, None]
        rows = [torch.minimum(at.long(), last)[:, None, :, None] for at in (low, low + 1)]
        below, above = (scores.take_along_dim(row, dim=2) for row in rows)
        return torch.lerp(below, above, (place - low).to(scores.dtype)[:, None, :, None])


class CausalEstimator(Estimator):
    r"""The estimator that reads no later token, and streams.

    Kernel features are $\mathrm{relu}(w^\top d^{-1/4} x) + 10^{-3}$, sums run over j <= i, and a learned table by position takes
    the identity's place. $W_r e$ is two rows of K/4 a head; normalised, they pass two causal convolutions 3 x 3 of dilation 2,
    are stretched by 4, mapped 1 x 1 to a row of K a head, and normalised. Options are those of `Estimator` without ``width``.

    State: ``sums`` (b, h, m, 2 d + 1), ``first`` and ``second`` (b, 2 h, 4, K/4), the last rows of the convolutions' inputs.

    Args:
        max_len: rows of the table.
    """

    def __init__(self, num_heads: int, head_dim: int, columns: int, *, max_len: int, **options: Unpack[EstimatorOptions]) -> None:
        if columns % 4:
            raise ValueError(f"estimate_dim: expected a multiple of 4, got {columns}")
        if max_len < 1:
            raise ValueError(f"max_len: expected at least 1, got {max_len}")
        super().__init__(num_heads, head_dim, columns, columns // 2, **options)
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        wide = 2 * num_heads
        self.max_len = max_len
        self.table = nn.Parameter(torch.randn(max_len, head_dim, **place))
        self.norm_in = nn.LayerNorm(columns // 4, **place)
        self.first = nn.Conv2d(wide, wide, 3, padding=(0, 2), dilation=2, **place)
        self.second = nn.Conv2d(wide, wide, 3, padding=(0, 2), dilation=2, **place)
        self.last = nn.Conv2d(wide, num_heads, 1, **place)
        self.norm_out = nn.LayerNorm(columns, **place)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype, sums: torch.dtype) -> State:
        """Nothing read."""
        window = torch.zeros(batch_size, 2 * self.num_heads, 4, self.columns // 4, device=device, dtype=dtype)
        shape = (batch_size, self.num_heads, len(self.directions), 2 * self.head_dim + 1)
        return State({"sums": torch.zeros(shape, device=device, dtype=sums), "first": window, "second": window.clone()})

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        position: Int[Tensor, "#b n"],
        mask: Bool[Tensor, "b n"] | None,
        state: State,
    ) -> tuple[Estimate, State]:
        """The estimate and the state after these tokens; k and v are 0 at masked ones."""
        place = self.table[position][:, None].expand(len(q), self.num_heads, -1, -1)
        read, written = (F.relu(x * self.head_dim**-0.25 @ self.directions.to(x.dtype).mT) + _RELU for x in (q, k))
        values = F.pad(torch.cat((place, v), dim=-1), (0, 1), value=1.0)
        if mask is not None:
            written = written.masked_fill(~mask[:, None, :, None], 0.0)
        mixed, sums = linear_attention(read, written, values, initial_state=state["sums"])
        e = self.describe(mixed[..., :-1] / mixed[..., -1:].masked_fill(mixed[..., -1:] == 0, 1.0), v)
        maps = self.norm_in(self.rows(e).unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2))
        maps, first = self._convolve(self.first, maps, mask, state["first"])
        maps, second = self._convolve(self.second, maps, mask, state["second"])
        scores = self.norm_out(self.last(maps.repeat_interleave(4, dim=3)))
        after = State({"sums": sums, "first": first, "second": second})
        return Estimate(scores, self.scaler(e).sigmoid()), after

    @staticmethod
    def _convolve(layer: nn.Conv2d, maps: Tensor, mask: Bool[Tensor, "b n"] | None, window: Tensor) -> tuple[Tensor, Tensor]:
        if mask is not None:
            maps = maps.masked_fill(~mask[:, None, :, None], 0.0)
        maps = torch.cat((window.to(maps.dtype), maps), dim=2)
        return F.relu(layer(maps)), maps[:, :, -4:]
