"""Models of different mixers at the same parameter count, found without allocating one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Matched:
    """A model size that meets a budget.

    Args:
        width: the model's width.
        hidden: the channel mixer's hidden width where it was needed to meet the budget, else None (its default ratio).
        parameters: parameters at this size.
        relative_error: (parameters - target) / target.
        model: the model, if it was asked for.
    """

    width: int
    hidden: int | None
    parameters: int
    relative_error: float
    model: nn.Module | None = None


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def match_budget(
    build: Callable[[int], nn.Module],
    target: int,
    *,
    multiple_of: int = 1,
    tolerance: float = 0.02,
    fine: Callable[[int, int], nn.Module] | None = None,
    max_width: int = 8192,
) -> Matched:
    """The width, a multiple of ``multiple_of``, at which ``build(width)`` has ``target`` parameters.

    Counting runs on the meta device: nothing is allocated and nothing initialised.

    Args:
        build: width to model.
        target: parameters wanted.
        multiple_of: step of the width, such as the number of heads.
        tolerance: allowed relative error.
        fine: (width, hidden width of the channel mixer) to model; used where the steps of the width are too coarse.
        max_width: where the search ends.

    Returns:
        The match, with ``model=None``.

    Raises:
        ValueError: if no width meets the target within ``tolerance``; the nearest is named.
    """
    raise NotImplementedError
