"""Ridge regression in closed form."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def ridge_fit(features: Float[Tensor, "s p"], targets: Float[Tensor, "s t"], strength: float | int) -> Float[Tensor, "p t"]:
    r"""$\arg\min_V \frac{1}{s}\lVert \Phi V - Y \rVert_F^2 + \lambda \lVert V \rVert_F^2$, in float64.

    Args:
        features: $\Phi$, one row an example (s, p).
        targets: Y, (s, t).
        strength: $\lambda$, positive.

    Raises:
        ValueError: for another number of rows, or a strength that is not positive.
    """
    if len(features) != len(targets):
        raise ValueError(f"targets: expected {len(features)} rows as features has, got {len(targets)}")
    if not strength > 0:
        raise ValueError(f"strength: expected a positive number, got {strength}")
    rows, count = features.double(), len(features)
    wide = rows.shape[1] > count  # then the smaller system is that of the examples
    gram = (rows @ rows.T if wide else rows.T @ rows) / count
    gram = gram + strength * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    factor = torch.linalg.cholesky(gram)
    right = targets.double() if wide else rows.T @ targets.double()
    solved = torch.cholesky_solve(right / count, factor)
    return (rows.T @ solved if wide else solved).to(features.dtype)
