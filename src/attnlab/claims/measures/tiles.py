"""What tiles cost: how near a neighbourhood's speed-up by tiles comes to that by its FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from attnlab.claims.cells import Cells
from attnlab.claims.quantity import Measured, over
from attnlab.ops.tile_attention.neighborhood.simulate import predict_speedup


def stride_bounds(cells: Cells, *, cases: Sequence[Mapping[str, Any]]) -> Measured:
    """The bound of the speed-up by tiles over that by FLOPs, at strides from 1 to the query tile's sides.

    Quantities: "plain" and "strided", that ratio at the first and at the last stride; "rises", the share of cases in which no
    stride has a lower one than the stride before it; "flat", the ratio at the last stride if tiles are runs of the flat grid.

    Args:
        cells: keeps each case.
        cases: "grid", "window", "tile" (of queries and of keys) and "strides", rising, each with a number an axis.
    """

    def measure(case: Mapping[str, Any]) -> dict[str, Any]:
        rows = []
        for stride in case["strides"]:
            found = predict_speedup(case["grid"], case["window"], stride, query_tile=case["tile"], key_tile=case["tile"])
            rows.append({"flops": found.by_flops, "tiles": found.by_tiles, "flat": found.by_flat_tiles})
        return {"strides": rows}

    runs = [cells(f"tiles of a grid {case['grid']}", dict(case), lambda case=case: measure(case))["strides"] for case in cases]  # type: ignore[misc]
    reached = [[row["tiles"] / row["flops"] for row in rows] for rows in runs]
    quantities = {
        "plain": over([ratios[0] for ratios in reached]),
        "strided": over([ratios[-1] for ratios in reached]),
        "rises": over([float(all(b >= a for a, b in pairwise(ratios))) for ratios in reached]),
        "flat": over([rows[-1]["flat"] / rows[-1]["flops"] for rows in runs]),
    }
    return Measured(quantities, {"cases": runs})
