"""A convolution and a BatchNorm over real tokens, which fold into one convolution for evaluation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.masks import zero_masked
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.convolutions import CONVOLUTIONS

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class ConvBN(nn.Module):
    r"""$y = w \odot (\mathrm{Conv}(x) - \mu) / \sqrt{\sigma^2 + \epsilon} + b$ a channel, zero padding, $\epsilon = 10^{-5}$.

    In training $\mu$ and $\sigma^2$ are those of all real tokens of the batch, in evaluation running means of them: a mixer that
    holds one declares ``batch_coupled=True``. Masked tokens are zero before the convolution, not in the statistics, and zero
    after it. A grid of a lower rank is one whose first sides are 1.

    Args:
        channels: of the input.
        out_channels: of the output.
        kernel_size: odd side of the kernel.
        rank: of the grid, 1 to 3.
        groups: of the convolution; ``channels`` for a depthwise one.
        scale: w at first; 0 lets a residual branch begin as nothing.
        bias: whether the convolution has one, which training cannot tell from the mean that the norm takes off.

    Raises:
        ValueError: for an even kernel, or another rank.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        rank: int = 2,
        groups: int = 1,
        scale: float = 1.0,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if rank not in (1, 2, 3):
            raise ValueError(f"rank: expected 1, 2 or 3, got {rank}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rank = rank
        self.conv = CONVOLUTIONS[rank - 1](
            channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=bias, **place
        )
        self.norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | None = _NORMS[rank - 1](out_channels, **place)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n e"]:
        """Convolve and normalise; ValueError for a grid of a higher rank."""
        if len(grid) > self.rank:
            raise ValueError(f"grid: expected at most {self.rank} sides, got {tuple(grid)}")
        y = self.conv(to_grid(zero_masked(x, mask), (1,) * (self.rank - len(grid)) + tuple(grid)))
        if self.norm is None:
            return zero_masked(from_grid(y), mask)
        if not self.training or (mask is None and y.numel() > y.shape[1]):
            return zero_masked(_normalize_all(y, self.norm).transpose(1, 2), mask)
        return _normalize_real(from_grid(y), self.norm, mask)

    def fuse(self) -> None:
        """Fold the norm into the convolution, which then has a bias: the same function in evaluation, with half the work.

        Raises:
            ValueError: in training mode, whose statistics are not known yet.
        """
        if self.training:
            raise ValueError("fuse: expected evaluation mode, got training; call eval() first")
        if self.norm is None:
            return
        norm: Any = self.norm  # torch types its buffers as optional
        with torch.no_grad():
            factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
            self.conv.weight.mul_(factor.view(-1, *[1] * (self.conv.weight.dim() - 1)))
            shift = 0.0 if self.conv.bias is None else self.conv.bias * factor
            self.conv.bias = nn.Parameter(norm.bias - norm.running_mean * factor + shift)
        self.norm = None


def fuse(module: nn.Module) -> None:
    """`ConvBN.fuse` on every one inside ``module``."""
    for part in module.modules():
        if isinstance(part, ConvBN):
            part.fuse()


def batch_norm(y: Float[Tensor, "b n c"], norm: nn.BatchNorm1d, mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n c"]:
    """``norm`` of the real tokens, over all of them in the batch in training; 0 at the others."""
    if norm.training and (mask is not None or y.numel() == y.shape[2]):
        return _normalize_real(y, norm, mask)
    return zero_masked(norm(y.transpose(1, 2)).transpose(1, 2), mask)


def _normalize_all(y: Float[Tensor, "b e *grid"], norm: Any) -> Float[Tensor, "b e n"]:
    """``norm`` of every token, the grid flat.

    On images and volumes torch 2.13's CPU backward returns a wrong gradient, and says nothing, where the batch is of one example
    and the gradient that arrives lies in memory tokens first with another stride of the batch; on flat tokens it is right.
    """
    if norm.training:
        norm.num_batches_tracked.add_(1)
    place = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return F.batch_norm(y.flatten(2), *place, norm.training, norm.momentum, norm.eps)


def _normalize_real(y: Float[Tensor, "b n e"], norm: Any, mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n e"]:
    # Sums over a fixed shape in place of the real tokens' rows, whose number neither a compiler nor a meta tensor knows.
    wide = y.to(accumulate_dtype(y.dtype))
    real = torch.ones_like(wide[..., :1]) if mask is None else mask.unsqueeze(-1).to(wide.dtype)
    count = real.sum()
    total = count.clamp(min=1.0)
    mean = (wide * real).sum(dim=(0, 1)) / total
    centred = (wide - mean) * real
    variance = centred.square().sum(dim=(0, 1)) / total
    with torch.no_grad():
        taught = (count > 0).to(wide.dtype)  # a batch without any real token teaches nothing
        unbiased = variance * (total / (total - 1.0).clamp(min=1.0))
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.add_((norm.momentum * taught * (new - running)).to(running.dtype))
        norm.num_batches_tracked.add_(1)
    out = centred * (variance + norm.eps).rsqrt() * norm.weight + norm.bias
    return zero_masked(out.to(y.dtype), mask)
