"""Online k-means: centroids a head that follow the vectors assigned to them by moving averages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.mixers.parts.moving_means import assigned, smoothed_means
from attnlab.ops.chunks import full_precision

RULES = ("counted", "renewed")


class Centroids(nn.Module):
    r"""C centroids a head, found by the largest product with a vector (Roy et al. 2020, Routing Transformer, section 4).

    After a batch of vectors x with assignments $z = \arg\max_c x^\top \mu_c$ the rule "counted" has

    $$N_c \leftarrow g N_c + (1 - g)\,|\{z = c\}|, \quad M_c \leftarrow g M_c + (1 - g) \sum_{z = c} x, \quad
      \mu_c = M_c / \tilde N_c, \quad \tilde N_c = N\, \frac{N_c + \epsilon}{N + C \epsilon}, \quad N = \sum_c N_c ,$$

    and "renewed" $\mu_c \leftarrow g \mu_c + (1 - g)\, \mathrm{unit}(\sum_{z = c} x)$ for those that were assigned any. All three
    are buffers, saved with the parameters.

    Args:
        num_heads: heads.
        number: C.
        width: of a vector.
        decay: g.
        rule: "counted" or "renewed".
        eps: $\epsilon$.
        generator: draws the first centroids, normal and then normalised: to mean 0 and variance 1 if counted, else to length 1.
        device: of the buffers.
        dtype: of the buffers.

    Raises:
        ValueError: for a number below 1, a decay outside [0, 1] or an unknown rule.
    """

    means: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        num_heads: int,
        number: int,
        width: int,
        *,
        decay: float | int = 0.999,
        rule: str = "counted",
        eps: float = 1e-5,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if number < 1:
            raise ValueError(f"num_clusters: expected at least 1, got {number}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number from 0 to 1, got {decay}")
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")
        self.decay, self.rule, self.eps = decay, rule, eps
        self.register_buffer("means", torch.empty(num_heads, number, width, device=device, dtype=dtype))
        self.register_buffer("counts", torch.ones(num_heads, number, device=device, dtype=dtype))
        self.register_buffer("sums", torch.empty(num_heads, number, width, device=device, dtype=dtype))
        self.redraw(generator)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Begin anew."""
        device = self.means.device if generator is None else generator.device
        drawn = torch.randn(self.means.shape, generator=generator, device=device)
        self.means.copy_(self.normalized(drawn))
        self.counts.fill_(1.0)
        self.sums.copy_(self.means)

    def normalized(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        """Vectors as they are compared with centroids."""
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.rule == "counted" else F.normalize(x, dim=-1)

    @torch.no_grad()
    @full_precision
    def similarity(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n c"]:
        """The product of each (normalised) vector with each centroid."""
        return x.to(self.means.dtype) @ self.means.mT

    def distance(
        self, x: Float[Tensor, "b h n d"], nearest: Int[Tensor, "b h n"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, ""]:
        """The mean square of what lies between real vectors and their centroids; the gradient is the vectors'."""
        head = torch.arange(x.shape[1], device=x.device)[:, None]
        squares = (x - self.means[head, nearest].to(x.dtype).detach()).square().mean(-1).mean(1)
        return squares.mean() if mask is None else squares.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)

    @torch.no_grad()
    @full_precision
    def update(self, x: Float[Tensor, "b h n d"], nearest: Int[Tensor, "b h n"], mask: Bool[Tensor, "b n"] | None) -> None:
        """Move on by a batch of vectors; masked ones take no part."""
        number, total = assigned(x.to(self.means.dtype), nearest, self.counts.shape[1], mask)
        if self.rule == "renewed":
            moved = torch.lerp(self.means, F.normalize(total, dim=-1), 1.0 - self.decay)
            self.means.copy_(torch.where((number > 0).unsqueeze(-1), moved, self.means))
            return
        self.counts.lerp_(number, 1.0 - self.decay)
        self.sums.lerp_(total, 1.0 - self.decay)
        self.means.copy_(smoothed_means(self.counts, self.sums, self.eps))
