"""CAB's compositional index and efficiency length, with their constants and what was published."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATTERNS = ("noncausal_self", "causal_self", "noncausal_cross", "causal_cross")
"""Where keys come from, and whether an output may depend on later tokens."""

LOWER_IS_BETTER = ("MCD", "MSD", "PPL", "CD-l1", "CD-l2", "MSE", "MAE")
"""Last words of the metrics whose sign is turned."""

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
"""Where the paper measures costs."""


@cache
def _constants() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("attnlab.tasks.cab").joinpath("constants.toml").read_text(encoding="utf-8"))


def index_columns(pattern: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation of each metric of each task of a pattern, in the published order.

    Raises:
        ValueError: for an unknown pattern.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern: expected one of {PATTERNS}, got {pattern!r}")
    return {
        task: {metric: (float(mean), float(deviation)) for metric, (mean, deviation) in columns.items()}
        for task, columns in _constants()[pattern].items()
    }


def compositional_index(pattern: str, scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    r"""A mechanism's index on each task of a pattern, and ``average``, their mean (Zhang et al. 2022, CAB).

    A task's index is the mean over its metrics of $\pm(x_m - \mu_m)/\sigma_m$, so signed that more is better.

    Args:
        pattern: one of `PATTERNS`.
        scores: for each task the raw metrics in the order of `index_columns`.

    Raises:
        ValueError: for an unknown pattern, or tasks or metrics that are not its own.
    """
    tasks = index_columns(pattern)
    if set(scores) != set(tasks):
        raise ValueError(f"scores: expected the tasks {', '.join(tasks)}, got {', '.join(scores)}")
    found = {}
    for task, columns in tasks.items():
        if len(scores[task]) != len(columns):
            raise ValueError(f"scores[{task!r}]: expected {', '.join(columns)}, got {len(scores[task])} numbers")
        signed = [
            (-1.0 if metric.split()[-1] in LOWER_IS_BETTER else 1.0) * (score - mean) / deviation
            for score, (metric, (mean, deviation)) in zip(scores[task], columns.items(), strict=True)
        ]
        found[task] = float(np.mean(signed))
    return {**found, "average": float(np.mean(list(found.values())))}


def efficiency_length(
    lengths: Sequence[int], softmax: Sequence[float], candidate: Sequence[float], *, skip: int = 0
) -> float | None:
    r"""The length from which a mechanism of linear cost is cheaper than softmax attention.

    Least squares give $a L^2 + b L + c$ for softmax and $d L + e$ for the candidate; the answer is the larger root of
    $a L^2 + (b - d) L + (c - e)$, None where there is none.

    Args:
        lengths: where both were measured, at least 3.
        softmax: its time or memory there.
        candidate: the same of the mechanism.
        skip: the first lengths that the candidate's line leaves out; the paper takes 1 for time and 0 for memory.

    Raises:
        ValueError: for too few lengths, or as many costs.
    """
    if not len(lengths) == len(softmax) == len(candidate) or len(lengths) < 3 or not 0 <= skip <= len(lengths) - 2:
        raise ValueError(
            "lengths, softmax, candidate: expected as many, at least 3 and 2 after those skipped, "
            f"got {len(lengths)}, {len(softmax)}, {len(candidate)} and skip={skip}"
        )
    quadratic = np.polyfit(lengths, softmax, 2)
    line = np.polyfit(lengths[skip:], candidate[skip:], 1)
    roots = np.roots(np.polysub(quadratic, line))
    real = roots[np.isreal(roots)].real
    return float(real.max()) if len(real) else None


def published_index(pattern: str) -> dict[str, dict[str, float]]:
    """For each mechanism of the paper its index by task and on average; NaN where none is known."""
    index_columns(pattern)
    return _table(_constants()["published"]["index"][pattern])


def published_efficiency_lengths() -> dict[str, dict[str, float]]:
    """For each mechanism of the paper the lengths by ``time`` and ``memory``."""
    return _table(_constants()["published"]["efficiency_length"])


def _table(rows: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {name: dict(zip(rows["columns"], row, strict=True)) for name, row in rows.items() if name != "columns"}
