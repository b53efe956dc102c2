"""Recall against the size of a partitioned state, at fixed parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from attnlab.claims.cells import Cells
from attnlab.claims.measures.recall import Setup, mean, sweep
from attnlab.claims.quantity import Measured, over


def expansion(
    cells: Cells, *, mixer: str, option: str, sizes: Sequence[int], options: Mapping[str, Any], setup: Mapping[str, Any]
) -> Measured:
    """Accuracy of recall for several sizes of a mixer's state, each at its best rate.

    Quantities: "accuracy_N" for each size; "gain", the accuracy of the largest less that of the smallest, paired by seed;
    "rises", 1 if the means rise from size to size, else 0.

    Args:
        cells: keeps each training run.
        mixer: what is measured.
        option: the option that sets the size.
        sizes: its values, rising.
        options: the mixer's other options.
        setup: the fields of `attnlab.claims.measures.recall.Setup` but for mixer and options.
    """
    details, scores = {}, {}
    for size in sizes:
        found = sweep(cells, Setup(mixer=mixer, mixer_options={**options, option: size}, **setup))
        details[f"{option} {size}"] = found
        scores[size] = [mean(result) for result in found["test"]]
    step = 1.0 / (setup["examples"] * sum(setup["pairs"]))
    quantities = {f"accuracy_{size}": over(values, resolution=step) for size, values in scores.items()}
    gains = [most - least for most, least in zip(scores[sizes[-1]], scores[sizes[0]], strict=True)]
    means = [quantities[f"accuracy_{size}"].mean for size in sizes]
    rises = all(later > earlier for earlier, later in pairwise(means))
    quantities |= {"gain": over(gains, resolution=2**0.5 * step), "rises": over([float(rises)])}
    return Measured(quantities, details)
