"""Norms of the residual stream by name, all aware of padding."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.errors import UnknownNameError, UnsupportedError, nearest
from attnlab.core.masks import zero_masked
from attnlab.mixers.parts.group_norm import group_norm
from attnlab.mixers.parts.norms import simple_rms_norm


class Norm(nn.Module):
    """Maps tokens (batch, n, dim) to the same shape, exactly zero at masked ones.

    ``per_token`` says whether a token is normalised by itself; only such a norm fits causal and streaming models.
    """

    per_token: ClassVar[bool] = True

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        """Normalise; this one, "none", leaves the tokens as they are."""
        return zero_masked(x, mask)


class LayerNorm(Norm):
    r"""$w \odot (x - \mathrm{mean}_c\,x) / \sqrt{\mathrm{var}_c\,x + \epsilon} + b$ of each token, $\epsilon = 10^{-5}$.

    Args:
        dim: channels.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        """Normalise each token over its channels."""
        return zero_masked(F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5), mask)


class RMSNorm(Norm):
    r"""$w \odot x / \sqrt{\mathrm{mean}_c\,x^2 + \epsilon}$ of each token, $\epsilon = 10^{-6}$.

    Args:
        dim: channels.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        """Scale each token to root mean square 1 over its channels."""
        return zero_masked(F.rms_norm(x, self.weight.shape, self.weight, 1e-6), mask)


class SimpleRMSNorm(Norm):
    r"""$x / \sqrt{\mathrm{mean}_c\,x^2 + \epsilon}$ of each token, no weights, $\epsilon = 10^{-6}$ (TransNormerLLM's SRMSNorm).

    Args:
        dim: channels, which it has no parameters for.
        device: of no use either.
        dtype: of no use either.
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        """Scale each token to root mean square 1 over its channels."""
        return zero_masked(simple_rms_norm(x), mask)


class GroupNorm(Norm):
    r"""Group normalisation with one group: mean and variance over channels and real tokens jointly, $\epsilon = 10^{-5}$.

    $$y_{ic} = w_c \frac{x_{ic} - \mu}{\sqrt{\sigma^2 + \epsilon}} + b_c$$

    What stands at masked tokens is not in $\mu$ and $\sigma^2$, and neither is their number.

    Args:
        dim: channels.
        device: of the parameters.
        dtype: of the parameters.
    """

    per_token = False

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        """Normalise each example over all its real tokens and channels."""
        return group_norm(x, self.weight, self.bias, mask)


_KINDS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm, "simple_rms_norm": SimpleRMSNorm, "group_norm": GroupNorm}
NORMS = (*_KINDS, "none")
"""Names that `create_norm` takes."""


def create_norm(
    name: str,
    dim: int,
    *,
    causal: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Norm:
    """The norm called ``name`` over ``dim`` channels.

    Args:
        name: "layer_norm", "rms_norm", "simple_rms_norm" (no weights), "group_norm" (one group, over tokens and channels) or
            "none".
        dim: channels.
        causal: whether the model that it is for must not see the future.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnknownNameError: for an unknown name.
        UnsupportedError: for "group_norm" with ``causal=True``.
    """
    if name == "none":
        return Norm()
    if name not in _KINDS:
        raise UnknownNameError(f"norm: expected one of {NORMS}, got {name!r}{nearest(name, NORMS)}")
    if causal and not _KINDS[name].per_token:
        can = [other for other, kind in _KINDS.items() if kind.per_token]
        raise UnsupportedError(name, "a causal model", "its statistics run over all tokens, later ones too", can)
    return _KINDS[name](dim, device=device, dtype=dtype)
