"""Gaussian adaptive attention: every feature weighted by Gaussians of its own normalised value."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision


def importance_factor(weights: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "c"]:
    """Which channels the weights prefer: their mean over examples and real tokens, stretched to 0 .. 1; all 0 if they tie.

    Args:
        weights: "feature_weights" as `GaussianAdaptiveAttention` emits them, of a data set or a part of one.
        mask: True marks a real token.
    """
    count = weights.shape[0] * weights.shape[1] if mask is None else mask.sum().clamp(min=1)
    mean = zero_masked(weights, mask).sum(dim=(0, 1)) / count
    low, high = mean.aminmax()
    return (mean - low) / (high - low).masked_fill(high == low, 1.0)


@mixers.register(
    "gaam",
    family="channel",
    paper="gaam",
    supports=Supports(causal="optional", streaming=True, grid=frozenset({1, 2, 3}), state="bounded", cost=1.0),
)
class GaussianAdaptiveAttention(StreamingMixer):
    r"""Multi-head Gaussian adaptive attention (Ioannides et al. 2024; equations as the authors' code has them).

    An axis, the channels of a token or the tokens of a channel, is cut into h chunks of floor(size / h) entries; the last takes
    the rest. In a chunk with entries a, its own offsets $\delta_k$ and widths $c_k$, k = 1..K,

    $$g_{ka} = \frac{1}{\sqrt{2 \pi c_k^2}} \exp\!\left(-\frac{(x_a - \mu - \delta_k)^2}{2 c_k^2 \sigma^2}\right), \qquad
      w_a = \prod_k g_{ka}, \qquad y_a = x_a \frac{w_a}{\max(\sum_{a'} w_{a'}, \epsilon)}$$

    with the mean $\mu$ and the unbiased variance $\sigma^2$, plus $\epsilon$, over the chunk. The product of the K Gaussians is
    one Gaussian, not a mixture of K; it is computed as such. 2 K h parameters. Time O(n C h), memory O(n C). Along the channels
    nothing passes between tokens; the state is empty. ``record`` collects "feature_weights" (b, n, C), see `importance_factor`.

    Args:
        dim: width of the tokens.
        num_heads: of the common signature; h unless ``num_chunks`` is given.
        causal: refused with ``axis="tokens"``, whose statistics read every token.
        num_gaussians: K.
        axis: "channels", "tokens", or "auto": "channels" if causal, else "tokens".
        num_chunks: h where it is no divisor of ``dim``; None takes ``num_heads``.
        eps: $\epsilon$.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=True`` and ``axis="tokens"``.
        ValueError: for an unknown axis, and for numbers that are not positive.

    Differs from the paper: whose code knows padding by its value, sets it to 0 but counts it, and passes it through. Here a
    masked token is in no chunk: sizes, statistics and sums are those of the real tokens alone. A chunk of one entry has the
    variance 0 (the unbiased one is not defined). The code's multi-head class hands ``eps`` to another argument, so that it is
    always 1e-8.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = False,
        num_gaussians: int = 4,
        axis: str = "auto",
        num_chunks: int | None = None,
        eps: float = 1e-8,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        self.num_chunks = num_heads if num_chunks is None else num_chunks
        if axis not in ("auto", "channels", "tokens"):
            raise ValueError(f"axis: expected 'auto', 'channels' or 'tokens', got {axis!r}")
        if causal and axis == "tokens":
            raise self._refusal("causal=True with axis='tokens'", "its statistics run over all tokens", causal=True)
        for name, value in (("num_gaussians", num_gaussians), ("num_chunks", self.num_chunks), ("eps", eps)):
            if value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.axis = ("channels" if causal else "tokens") if axis == "auto" else axis
        self.eps = eps
        shape = (self.num_chunks, num_gaussians)
        self.offset = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.width = nn.Parameter(torch.randn(shape, device=device, dtype=dtype).exp())

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Nothing is carried; the batch size alone is there."""
        return State({"nothing": torch.zeros(batch_size, 0, device=device, dtype=dtype)})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Each token by itself."""
        return self._weigh(x, mask), State(dict(state))

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Weigh the entries of every chunk."""
        return self._weigh(x, masks.query)

    def _weigh(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n c"]:
        wide = x.to(accumulate_dtype(x.dtype))
        if self.axis == "channels":
            members = self._members(torch.ones_like(x[:1, 0], dtype=torch.bool), wide.dtype)
            weights = self._weights(wide.transpose(1, 2), members).transpose(1, 2)
        else:
            real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
            weights = self._weights(wide, self._members(real, wide.dtype))
        self.emit("feature_weights", weights)
        return (wide * weights).to(x.dtype)

    def _members(self, real: Bool[Tensor, "b a"], dtype: torch.dtype) -> Float[Tensor, "b a h"]:
        """1 where an entry is in a chunk; entries that are not real are in none and are not counted."""
        rank, size = real.cumsum(dim=1) - 1, real.sum(dim=1, keepdim=True) // self.num_chunks
        last = self.num_chunks - 1
        chunk = torch.where(size > 0, (rank.clamp(min=0) // size.clamp(min=1)).clamp(max=last), last)
        chunks = torch.arange(self.num_chunks, device=real.device)
        return ((chunk.unsqueeze(-1) == chunks) & real.unsqueeze(-1)).to(dtype)

    @full_precision
    def _weights(self, x: Float[Tensor, "b a e"], members: Float[Tensor, "#b a h"]) -> Float[Tensor, "b a e"]:
        """Normalised weights along a: sums over a chunk are products with ``members``, and what is not real gets 0."""
        gather = members.transpose(1, 2)
        count = gather.sum(dim=-1, keepdim=True)
        centred = x - members @ ((gather @ x) / count.clamp(min=1.0))
        variance = members @ ((gather @ centred.square()) / (count - 1.0).clamp(min=1.0)) + self.eps
        # The exponents add up to one parabola: sum_k a_k (z - d_k)^2 = A (z - m)^2 + sum_k a_k (d_k - m)^2.
        offset, width = self.offset.to(x.dtype), self.width.to(x.dtype)
        a = 0.5 / width.square()
        middle = (a * offset).sum(dim=-1) / a.sum(dim=-1)
        rest = (a * (offset - middle.unsqueeze(-1)).square()).sum(dim=-1)
        log_height = -0.5 * (2.0 * math.pi * width.square()).log().sum(dim=-1)
        steep, centre, low, height = (members @ torch.stack((a.sum(dim=-1), middle, rest, log_height), dim=-1)).split(1, dim=-1)
        weights = (height - (steep * (centred - centre).square() + low) / variance).exp() * members.sum(dim=-1, keepdim=True)
        return weights / (members @ (gather @ weights)).clamp(min=self.eps)
