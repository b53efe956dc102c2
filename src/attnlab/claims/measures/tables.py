"""Published tables worked out again: CAB's index from its raw scores, and what ListOps gives without reading a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnlab.claims.cells import Cells
from attnlab.claims.quantity import Measured, over
from attnlab.tasks.cab.index import compositional_index, index_columns, published_index
from attnlab.tasks.lra.listops import listops_shard
from attnlab.tasks.lra.listops_trees import ListOpsSettings

PRINTED = 0.5e-3
"""Half of the last digit of a printed index."""


def cab_index(cells: Cells, *, tables: Sequence[Mapping[str, Any]]) -> Measured:
    """CAB's compositional index from the raw scores that the paper prints, against the index that it prints.

    An index agrees where it differs by no more than rounding explains: that of the scores, through the index, and its own.

    Quantities: "agree", the share of indexes that do; "difference", the mean size of the differences.

    Args:
        cells: unused, since this takes no time.
        tables: for each task "pattern", "task", "digits" (decimals of each metric's scores) and "scores" (each mechanism's).
    """
    rows = [row for table in tables for row in _compare(table)]
    quantities = {
        "agree": over([float(abs(row["index"] - row["published"]) <= row["rounding"]) for row in rows]),
        "difference": over([abs(row["index"] - row["published"]) for row in rows]),
    }
    return Measured(quantities, {"indexes": rows})


def _compare(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    pattern, task = table["pattern"], table["task"]
    columns = index_columns(pattern)
    plain = {name: [mean for mean, _ in metrics.values()] for name, metrics in columns.items()}
    halves = [
        0.5 * 10.0**-digits / deviation for digits, (_, deviation) in zip(table["digits"], columns[task].values(), strict=True)
    ]
    rounding = float(np.mean(halves)) + PRINTED
    return [
        {
            "pattern": pattern,
            "task": task,
            "mechanism": name,
            "index": compositional_index(pattern, {**plain, task: scores})[task],
            "published": published_index(pattern)[name][task],
            "rounding": rounding,
        }
        for name, scores in table["scores"].items()
    ]


def listops_baselines(cells: Cells, *, settings: Mapping[str, int], trees: int, draws: int) -> Measured:
    """Accuracy on ListOps of the most frequent value, and of the most frequent one among trees with the same root operator.

    Quantities: "majority" and "root_operator", each counted on the trees that it is tried on; "length", mean tokens of a tree.

    Args:
        cells: keeps each draw.
        settings: fields of `ListOpsSettings`.
        trees: trees a draw.
        draws: streams.
    """

    def measure(seed: int) -> dict[str, Any]:
        found = listops_shard(0, trees, settings=ListOpsSettings(**settings), seed=seed)
        starts = found["lengths"].cumsum() - found["lengths"]
        roots, values = found["ids"][starts], found["values"]
        best = sum(int(np.bincount(values[roots == root]).max()) for root in np.unique(roots))
        return {
            "majority": float(np.bincount(values).max()) / trees,
            "root_operator": best / trees,
            "length": float(found["lengths"].mean()),
        }

    facts = {"settings": dict(settings), "trees": trees}
    runs = [
        cells(f"ListOps trees, draw {seed}", {**facts, "seed": seed}, lambda seed=seed: measure(seed))  # type: ignore[misc]
        for seed in range(draws)
    ]
    quantities = {name: over([run[name] for run in runs], resolution=1.0 / trees) for name in ("majority", "root_operator")}
    quantities["length"] = over([run["length"] for run in runs], unit="tokens")
    return Measured(quantities, {"draws": runs})
