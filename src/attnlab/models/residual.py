"""How a branch joins the residual stream: gate, LayerScale, stochastic depth."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Residual(nn.Module):
    r"""$x + D(\lambda \odot g(x, f))$ for the stream $x$ and a branch's output $f$.

    Args:
        dim: channels.
        layer_scale: initial value of $\lambda$, a factor a channel (Touvron et al. 2021); None leaves it out.
        drop_path: probability with which training drops the branch of an example, the others being divided by its complement
            (stochastic depth, Huang et al. 2016).
        gate: $g$, a module of stream and branch, or None for the branch itself.
        generator: what stochastic depth draws from; None is torch's own. It lives on any device.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if ``drop_path`` is not in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        gate: nn.Module | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path: expected a probability in [0, 1), got {drop_path}")
        self.drop_path, self.gate, self.generator = drop_path, gate, generator
        self.scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, device=device, dtype=dtype))

    def branch(self, x: Float[Tensor, "b n c"], f: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """What is added to the stream ``x`` for a branch's output ``f``."""
        if self.gate is not None:
            f = self.gate(x, f)
        if self.scale is not None:
            f = f * self.scale
        if self.training and self.drop_path > 0.0:
            where = self.generator.device if self.generator is not None else f.device
            drawn = torch.rand((f.shape[0], 1, 1), generator=self.generator, device=where).to(f.device)
            f = torch.where(drawn >= self.drop_path, f / (1.0 - self.drop_path), 0.0)
        return f

    def forward(self, x: Float[Tensor, "b n c"], f: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Stream and branch joined."""
        return x + self.branch(x, f)
