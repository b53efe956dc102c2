"""Models of different mixers of the same size: as many parameters, found without allocating one, or as much work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

_REFUSALS = 64  # steps of the width that a mixer may refuse in a row


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


@dataclass(frozen=True)
class Size:
    """What models are to have as much of.

    Args:
        name: in the plural, for messages.
        of: the amount in a model that a function builds.
    """

    name: str
    of: Callable[[Callable[[], nn.Module]], int]


def _on_meta(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return count_parameters(build())


PARAMETERS = Size("parameters", _on_meta)


def match_budget(
    build: Callable[[int], nn.Module],
    target: int,
    *,
    multiple_of: int = 1,
    tolerance: float = 0.02,
    fine: Callable[[int, int], nn.Module] | None = None,
    max_width: int = 8192,
    size: Size = PARAMETERS,
) -> Matched:
    """The width, a multiple of ``multiple_of``, at which ``build(width)`` has ``target`` parameters, or as much of another size.

    Parameters are counted on the meta device: nothing is allocated and nothing initialised. The nearest width is taken; if it
    misses by more than ``tolerance``, the hidden width of the channel mixer, between half and eight times the width, makes up
    for it.

    Args:
        build: width to model; the count must not fall as the width rises. Widths refused by ValueError are passed over.
        target: parameters wanted.
        multiple_of: step of the width, such as the number of heads.
        tolerance: allowed relative error.
        fine: (width, hidden width of the channel mixer) to model; used where the steps of the width are too coarse.
        max_width: where the search ends.
        size: what is to be met.

    Returns:
        The match, with ``model=None``; ``parameters`` is the amount of ``size``.

    Raises:
        ValueError: if no width meets the target within ``tolerance``; the nearest is named.
    """
    if target < 1 or multiple_of < 1 or max_width < multiple_of:
        raise ValueError(
            "target, multiple_of, max_width: expected positive integers, max_width >= multiple_of, "
            f"got {target}, {multiple_of}, {max_width}"
        )
    widths = _nearest_widths(build, target, multiple_of, max_width, size)
    width, parameters = widths[0]
    best = Matched(width, None, parameters, parameters / target - 1.0)
    if abs(best.relative_error) > tolerance and fine is not None:
        matches = [_match_hidden(fine, width, target, size) for width, _ in widths]
        best = min([best, *matches], key=lambda match: abs(match.relative_error))
    if abs(best.relative_error) > tolerance:
        raise ValueError(
            f"target: no width that is a multiple of {multiple_of} gives {target} {size.name} within {tolerance:.1%}; the "
            f"nearest is width {best.width} with {best.parameters} ({best.relative_error:+.1%}). Widen the tolerance, change the "
            "target, or give a channel mixer whose hidden width can make up for it"
        )
    return best


def _nearest_widths(
    build: Callable[[int], nn.Module], target: int, step: int, max_width: int, size: Size
) -> list[tuple[int, int]]:
    """The widths on both sides of the target with their counts, the nearer first."""
    counts: dict[int, tuple[int, int]] = {}

    def count(k: int) -> tuple[int, int]:
        """The first width from ``k`` steps on that is not refused, in steps, and its size."""
        if k not in counts:
            counts[k] = _first_built(build, k, step, max_width // step, size)
        return counts[k]

    low, high, last = 1, 1, max_width // step
    while high < last and count(high)[1] < target:
        low, high = high, min(2 * high, last)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle)[1] < target else (low, middle)
    found = {(steps * step, amount) for steps, amount in (count(low), count(high))}
    return sorted(found, key=lambda found: (abs(found[1] - target), found[0]))


def _first_built(build: Callable[[int], nn.Module], k: int, step: int, last: int, size: Size) -> tuple[int, int]:
    refusal = ValueError(f"width: expected at most {last * step}, the search came to {k * step}")
    for steps in range(k, min(k + _REFUSALS, last + 1)):
        try:
            return steps, size.of(lambda steps=steps: build(steps * step))  # type: ignore[misc]
        except ValueError as error:
            refusal = error
    raise refusal


def _match_hidden(fine: Callable[[int, int], nn.Module], width: int, target: int, size: Size) -> Matched:
    """The hidden width at which ``width`` comes nearest; the count is affine in it."""
    least, most = max(1, width // 2), 8 * width
    base = size.of(lambda: fine(width, least))
    slope = size.of(lambda: fine(width, least + 1)) - base
    hidden = least if slope <= 0 else min(most, max(least, least + round((target - base) / slope)))
    parameters = base + slope * (hidden - least)
    return Matched(width, hidden, parameters, parameters / target - 1.0)
