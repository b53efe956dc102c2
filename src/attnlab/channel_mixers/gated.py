"""Gated linear units: one half of the inner channels opens the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.channel_mixers.contract import ChannelMixer
from attnlab.channel_mixers.registry import channel_mixers
from attnlab.core.errors import UnknownNameError, nearest
from attnlab.core.grid import Grid

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "identity": nn.Identity(),
}


@channel_mixers.register("glu")
class GLU(ChannelMixer):
    r"""$W_o\,(\sigma(W_g x) \odot W_u x)$ (Dauphin et al. 2017; the other activations are Shazeer's, 2020).

    Args:
        dim: width of the tokens.
        hidden: inner width; by default 8/3 dim, which costs what the MLP of ratio 4 does.
        activation: $\sigma$: "sigmoid" (GLU), "silu" (SwiGLU), "gelu" (GEGLU), "relu" (ReGLU), "identity" (bilinear).
        bias: whether the layers have one.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnknownNameError: for an unknown activation.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        activation: str = "sigmoid",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, round(8 * dim / 3) if hidden is None else hidden)
        if activation not in _ACTIVATIONS:
            raise UnknownNameError(
                f"activation: expected one of {sorted(_ACTIVATIONS)}, got {activation!r}{nearest(activation, _ACTIVATIONS)}"
            )
        self.activation = activation
        self.up = nn.Linear(dim, 2 * self.hidden, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(self.hidden, dim, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "b n c"]:
        """Each token through the gate; ``mask`` and ``grid`` make no difference."""
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(_ACTIVATIONS[self.activation](gate) * value)


@channel_mixers.register("swiglu")
class SwiGLU(GLU):
    r"""$W_o\,(\mathrm{SiLU}(W_g x) \odot W_u x)$ (Shazeer 2020): `GLU` with the activation of most language models.

    Args:
        dim: width of the tokens.
        hidden: inner width; by default 8/3 dim.
        bias: whether the layers have one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, hidden, activation="silu", bias=bias, device=device, dtype=dtype)
