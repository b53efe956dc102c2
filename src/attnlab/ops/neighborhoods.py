"""Neighbourhoods: which keys a query sees along one axis of a grid, by window, stride, dilation and causality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    r"""The rule of one axis of ``size`` cells.

    Cells that are congruent modulo the dilation form a group, in which they are counted 0 to n' - 1. The query at place i of
    its group has the leader m of its stride group, $m = \min(s \lfloor i/s \rfloor + \lfloor s/2 \rfloor, n'-1)$, and sees the
    w places around it, $\lfloor w/2 \rfloor$ of them before m: at borders the window is shifted, never cut. Where causal, the
    leader is the last of the stride group, and the query sees the w places that end there, as far as they are not after itself.

    Args:
        size: n, cells along the axis.
        window: w, keys a query sees.
        stride: s, neighbouring queries that share a window.
        dilation: distance of the keys of a window.
        causal: no later cell is seen.

    Raises:
        ValueError: unless 1 <= stride <= window, 1 <= dilation, and window * dilation <= size.
    """

    size: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if self.window < 1 or self.dilation < 1:
            raise ValueError(f"window, dilation: expected at least 1, got {self.window} and {self.dilation}")
        if not 1 <= self.stride <= self.window:
            raise ValueError(f"stride: expected 1 to the window {self.window}, got {self.stride}")
        if self.window * self.dilation > self.size:
            raise ValueError(
                f"window: expected window * dilation of at most the axis' {self.size} cells, got {self.window} * "
                f"{self.dilation}; a window of {max(1, self.size // self.dilation)} would fit"
            )

    @classmethod
    def fitted(cls, size: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> Axis:
        """The rule on an axis that may be too short for it: the dilation, then the window become what fits."""
        dilation = max(1, min(dilation, size // window))
        window = min(window, size // dilation)
        return cls(size, window, min(stride, window), dilation, causal)

    def table(self, table: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
        """The offsets along ``dim`` of a table that this window can have, where it was made for a larger one."""
        reach = table.shape[dim] // 2
        return table.narrow(dim, reach - self.window + 1, 2 * self.window - 1)

    def groups(self) -> Iterator[Int[Tensor, "m"]]:
        """The cells of each dilation group."""
        for first in range(self.dilation):
            yield torch.arange(first, self.size, self.dilation)

    def reach(self, count: int) -> tuple[Int[Tensor, "m"], Int[Tensor, "m"]]:
        """First and last key, both included, of each query of a group of ``count`` cells, as places in the group."""
        place = torch.arange(count)
        ahead = self.stride - 1 if self.causal else self.stride // 2
        leader = (place // self.stride * self.stride + ahead).clamp(max=count - 1)
        if self.causal:
            return (leader - self.window + 1).clamp(min=0), place
        before, after = self.window // 2, (self.window - 1) // 2
        center = leader.clamp(before, count - 1 - after)
        return center - before, center + after

    def visible(self) -> Bool[Tensor, "n n"]:
        """Every pair of query and key."""
        seen = torch.zeros(self.size, self.size, dtype=torch.bool)
        for cells in self.groups():
            first, last = self.reach(len(cells))
            place = torch.arange(len(cells))
            seen[cells[:, None], cells] = (place >= first[:, None]) & (place <= last[:, None])
        return seen

    def offsets(self) -> Int[Tensor, "n n"]:
        """How many keys of its group lie between query and key, key less query; 0 for pairs of different groups."""
        cell = torch.arange(self.size)
        distance = cell - cell[:, None]
        return torch.where(distance % self.dilation == 0, distance // self.dilation, 0)


def axes_of(
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> tuple[Axis, ...]:
    """The rules of all axes of a grid; a single value is that of every axis.

    Raises:
        ValueError: for another number of values than axes, and what `Axis` raises.
    """
    options = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    values = {name: _each(name, value, len(grid)) for name, value in options.items()}
    return tuple(Axis(size, *(values[name][i] for name in options)) for i, size in enumerate(grid))


def _each(name: str, value: object, rank: int) -> tuple:  # type: ignore[type-arg]
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{name}: expected one value, or one for each of {rank} axes, got {values}")
    return values


def neighborhood_mask(axes: Sequence[Axis]) -> Bool[Tensor, "n n"]:
    """Every pair of query and key of a grid, row-major: visible on all axes."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        seen = torch.kron(seen.to(torch.uint8), axis.visible().to(torch.uint8)).bool()
    return seen
