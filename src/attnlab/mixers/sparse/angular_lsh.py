"""Angular locality-sensitive hashing: buckets by the signs of random projections, neighbours in one sign next to each other."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.ops.chunks import full_precision


class AngularLSH(nn.Module):
    r"""Buckets of vectors by r random directions (Han et al. 2023, HyperAttention, section 2.1).

    $$c(x) = \sum_{i < r} 2^i\, [p_i^\top x > 0], \qquad \mathrm{bucket}(x) = c \oplus \lfloor c / 2 \rfloor$$

    in Gray's code, where halves of the numbers are mirror images. The directions are a buffer, saved with the parameters.

    Args:
        width: of a vector.
        num_projections: r, from 1 to 30.
        generator: draws the directions.
        device: of the directions.
        dtype: of the directions.

    Raises:
        ValueError: for another number of projections.
    """

    directions: Tensor

    def __init__(
        self,
        width: int,
        num_projections: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= num_projections <= 30:
            raise ValueError(f"num_projections: expected 1 to 30, got {num_projections}")
        self.num_buckets = 2**num_projections
        self.register_buffer("directions", torch.empty(width, num_projections, device=device, dtype=dtype))
        self.redraw(generator)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Replace the directions by new ones."""
        device = self.directions.device if generator is None else generator.device
        self.directions.copy_(torch.randn(self.directions.shape, generator=generator, device=device))

    @torch.no_grad()
    @full_precision
    def forward(self, x: Float[Tensor, "*s d"]) -> Int[Tensor, "*s"]:
        """The bucket of each vector."""
        bits = (x.to(self.directions.dtype) @ self.directions > 0).long()
        code = (bits << torch.arange(bits.shape[-1], device=x.device)).sum(-1)
        return code ^ (code >> 1)
