"""Feature maps of queries and keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def elu_plus_one(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    r"""$\mathrm{elu}(x) + 1$: x + 1 above 0, exp(x) below; positive everywhere.

    Written out because the compiler's shape rule for torch's own elu gives its gradient another memory layout than it has; with
    relu, whose gradient takes a tenth of the time of that of a choice or a clamp, and so that the derivative at 0 is 1.
    """
    above = torch.relu(x)
    return above + (x - above).exp()


def squared_relu(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    r"""$\max(x, 0)^2$."""
    return torch.relu(x).square()


def identity(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """x itself."""
    return x


def softmax_channels(x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
    """Softmax over the channels of a head, each token alone."""
    return x.softmax(dim=-1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": torch.relu,
    "squared_relu": squared_relu,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "softmax": softmax_channels,
    "leaky_relu": F.leaky_relu,
    "identity": identity,
}
"""Maps that keep the width, by name; "leaky_relu" and "identity" have negative values, whose sums may vanish."""


def feature_map(name: str, *, among: tuple[str, ...] = tuple(FEATURE_MAPS)) -> Callable[[Tensor], Tensor]:
    """The map called ``name``; ValueError unless it is one of ``among``."""
    if name not in among:
        raise ValueError(f"feature_map: expected one of {sorted(among)}, got {name!r}")
    return FEATURE_MAPS[name]
