"""A codebook that follows the vectors assigned to it by moving averages."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.mixers.parts.moving_means import assigned, smoothed_means
from attnlab.ops.chunks import full_precision


class Codebook(nn.Module):
    r"""S codewords a head, each the moving average of the keys that are nearest to it (van den Oord et al. 2017, appendix A.1).

    $$z_j = \arg\min_c \lVert k_j - C_c \rVert_2, \qquad \hat k_j = k_j + \mathrm{sg}(C_{z_j} - k_j)$$

    After a batch of keys $N_c \leftarrow g N_c + (1 - g)\,|\{j : z_j = c\}|$ and $M_c \leftarrow g M_c + (1 - g) \sum_{z_j = c}
    k_j$, and $C_c = M_c / \tilde N_c$ with the counts smoothed to $\tilde N_c = N (N_c + \epsilon) / (N + S \epsilon)$, $N =
    \sum_c N_c$. The two sums are buffers, saved with the parameters. Where processes share a model their buffers must be kept
    alike, as DistributedDataParallel does by sending those of its first process.

    Args:
        num_heads: h.
        size: S.
        width: d.
        decay: g.
        std: of the codewords before any key was seen.
        eps: $\epsilon$.

    Raises:
        ValueError: for a size below 1 or a decay outside [0, 1).
    """

    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        num_heads: int,
        size: int,
        width: int,
        *,
        decay: float | int = 0.99,
        std: float = 0.02,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"codebook_size: expected at least 1, got {size}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number from 0 to below 1, got {decay}")
        self.decay, self.eps = decay, eps
        self.register_buffer("counts", torch.ones(num_heads, size, device=device, dtype=dtype))
        self.register_buffer("sums", std * torch.randn(num_heads, size, width, device=device, dtype=dtype))

    @property
    def vectors(self) -> Float[Tensor, "h s d"]:
        """C, new memory: what was computed with it can be differentiated after the next update."""
        return smoothed_means(self.counts, self.sums, self.eps)

    @torch.no_grad()
    @full_precision
    def nearest(self, keys: Float[Tensor, "b h n d"]) -> Int[Tensor, "b h n"]:
        """z, of equally near ones the first."""
        vectors = self.vectors
        keys = keys.to(vectors.dtype)
        return (vectors.square().sum(-1)[:, None] - 2.0 * keys @ vectors.mT).argmin(-1)

    def quantize(self, keys: Float[Tensor, "b h n d"], codes: Int[Tensor, "b h n"]) -> Float[Tensor, "b h n d"]:
        """The codewords' vectors, with the gradient of the keys."""
        return keys + (self.look_up(codes).to(keys.dtype) - keys).detach()

    def look_up(self, codes: Int[Tensor, "b h n"]) -> Float[Tensor, "b h n d"]:
        """The codewords' vectors."""
        head = torch.arange(codes.shape[1], device=codes.device)[:, None]
        return self.vectors[head, codes]

    def distance(
        self, keys: Float[Tensor, "b h n d"], codes: Int[Tensor, "b h n"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, ""]:
        r"""The mean of $\lVert k - \mathrm{sg}(C_z) \rVert^2$ over heads and real tokens."""
        squares = (keys - self.look_up(codes).to(keys.dtype)).square().sum(-1).mean(1)
        return squares.mean() if mask is None else squares.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)

    @torch.no_grad()
    @full_precision
    def update(self, keys: Float[Tensor, "b h n d"], codes: Int[Tensor, "b h n"], mask: Bool[Tensor, "b n"] | None) -> None:
        """Move the averages on by one batch; masked tokens take no part."""
        number, total = assigned(keys.to(self.sums.dtype), codes, self.counts.shape[1], mask)
        self.counts.lerp_(number, 1.0 - self.decay)
        self.sums.lerp_(total, 1.0 - self.decay)

    @torch.no_grad()
    @full_precision
    def seed(self, keys: Float[Tensor, "b h n d"], mask: Bool[Tensor, "b n"] | None, generator: torch.Generator | None) -> None:
        """Begin anew with codewords drawn among the real keys by k-means++ (Arthur and Vassilvitskii 2007)."""
        drawn_on = keys.device if generator is None else generator.device
        rows = keys.transpose(0, 1).flatten(1, 2).to(self.sums.dtype)
        real = torch.ones(rows.shape[1], device=rows.device) if mask is None else mask.flatten().to(rows.dtype)
        chance = real.expand(rows.shape[0], -1)
        nearest = torch.full_like(rows[..., 0], float("inf"))
        for word in range(self.counts.shape[1]):
            chosen = torch.multinomial(chance.to(drawn_on), 1, generator=generator).to(rows.device)
            vector = rows.take_along_dim(chosen.unsqueeze(-1), 1)
            self.sums[:, word] = vector[:, 0]
            nearest = torch.minimum(nearest, (rows - vector).square().sum(-1)) * real
            spent = nearest.sum(-1, keepdim=True) == 0  # fewer distinct keys than codewords: repeat some
            chance = torch.where(spent, real, nearest)
        self.counts.fill_(1.0)
