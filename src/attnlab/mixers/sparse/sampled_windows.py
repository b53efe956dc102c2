"""Random windows of a sequence or grid, every token in exactly one: the sampling laws of `SubsampledAttention`."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.core.grid import Grid


def sample_windows(
    grid: Grid,
    *,
    reduction: float | int,
    sigma: float | int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Int[Tensor, "w s"]:
    r"""Draw a partition of the tokens of a grid into windows.

    Unbiased: a random permutation of all n tokens, cut every $\lceil n/c \rceil$. Local: on each axis of side N the coordinates
    are sorted by $i + e_i$, $e_i \sim \mathcal{N}(0, \sigma^2)$ reflected at the ends, and cut every
    $\lceil N c^{-1/r} \rceil$ with a random offset; a window of a grid of rank r is a product of one of each axis. With
    $\sigma = 0$ these are shifted windows.

    Args:
        grid: sides; a sequence is a grid of rank 1.
        reduction: c, how many times fewer keys a token has, at least 1; 1 gives one window.
        sigma: of the jitter, in tokens; None for unbiased.
        generator: source of the draws; None for the global one.
        device: of the result.

    Returns:
        Token indices in rising order, and then -1 where a window has no more: (windows, size).
    """
    source = device if generator is None else generator.device
    if sigma is None:
        n = math.prod(grid)
        members = _cut(torch.randperm(n, generator=generator, device=source), math.ceil(n / reduction), None)
    else:
        members = torch.zeros(1, 1, dtype=torch.int64, device=source)
        for side in grid:
            size = math.ceil(side * float(reduction) ** (-1 / len(grid)) - 1e-9)  # 8 ** (1/3) is not exactly 2
            jitter = sigma * torch.randn(side, generator=generator, device=source, dtype=torch.float64)
            order = _reflected(torch.arange(side, device=source) + jitter, side).argsort(stable=True)
            offset = torch.randint(size, (), generator=generator, device=source) if size < side else None
            axis = _cut(order, size, offset)
            both = members[:, None, :, None] * side + axis[None, :, None, :]
            there = (members[:, None, :, None] >= 0) & (axis[None, :, None, :] >= 0)
            members = both.masked_fill(~there, -1).flatten(2).flatten(0, 1)
    last = math.prod(grid)
    members = members.masked_fill(members < 0, last).sort(dim=1).values  # in order, so that causality inside is by rank
    return members.masked_fill(members == last, -1).to(device)


def _cut(order: Int[Tensor, " n"], size: int, offset: Int[Tensor, ""] | None) -> Int[Tensor, "w s"]:
    """Runs of ``size``; with an offset the first run is shorter. What is missing is -1, and so may be the last run."""
    n = len(order)
    slots = torch.arange(n, device=order.device)
    count = -(-n // size)
    if offset is not None:
        slots, count = slots + offset, -(-(n + size - 1) // size)
    return torch.full((count * size,), -1, device=order.device).scatter(0, slots, order).unflatten(0, (count, size))


def _reflected(places: Float[Tensor, " n"], side: int) -> Float[Tensor, " n"]:
    """Places folded into [-1/2, side - 1/2], as often as they leave it."""
    folded = (places + 0.5).remainder(2 * side)
    return torch.minimum(folded, 2 * side - folded) - 0.5


def check_windows(windows: Int[Tensor, "w s"], num_tokens: int) -> None:
    """Refuse (ValueError) windows that do not hold every token exactly once, in rising order."""
    if windows.dim() != 2 or windows.is_floating_point():
        raise ValueError(f"windows: expected integers (windows, size), got {windows.dtype} {tuple(windows.shape)}")
    inside = windows[windows >= 0].sort().values
    if not torch.equal(inside, torch.arange(num_tokens, device=windows.device)):
        raise ValueError(f"windows: expected each of {num_tokens} tokens exactly once, got {inside.tolist()[:16]}")
    ranked = windows.masked_fill(windows < 0, num_tokens)
    if bool((ranked.diff(dim=1) < 0).any()):
        raise ValueError("windows: expected rising indices in each window, -1 behind them")


def layer_sigma(first: float | int, layer: int) -> float:
    r"""$\sigma_l = \sigma_1 2^{l}$ for layer l = 0, 1, ...: deeper layers look further.

    Raises:
        ValueError: for a negative sigma or layer.
    """
    if first < 0 or layer < 0:
        raise ValueError(f"first, layer: expected 0 or more, got {first} and {layer}")
    return float(first) * 2.0**layer


def is_dense_step(step: int, num_steps: int, fraction: float = 0.1) -> bool:
    """Whether training step ``step`` = 0, 1, ... is one of the last ``fraction`` of ``num_steps``, which are dense.

    Raises:
        ValueError: for a fraction outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: expected 0 to 1, got {fraction}")
    return step >= num_steps - round(fraction * num_steps)
