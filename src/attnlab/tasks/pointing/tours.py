"""Shortest closed tours through few points, by dynamic programming over subsets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from jaxtyping import Float, Int

_SLICE = 32
MOST_CITIES = 13
"""Points that `shortest_tours` takes: the table has 2^(n-1) (n - 1) entries an example."""


def distances(points: Float[np.ndarray, "b n d"]) -> Float[np.ndarray, "b n n"]:
    """Euclidean distances of all pairs."""
    return np.sqrt(np.square(points[:, :, None] - points[:, None]).sum(-1))


def shortest_tours(points: Float[np.ndarray, "b n d"]) -> Int[np.ndarray, "b n"]:
    r"""The shortest tour of each example: from city 0, in the direction whose second city has the smaller index.

    Held and Karp (1962): with $C(S, j)$ the length of the shortest path from city 0 through all of S that ends in $j \in S$,
    $C(S, j) = \min_{k \in S \setminus j} C(S \setminus j, k) + d_{kj}$; time O(2^n n^2).

    Raises:
        ValueError: for fewer than 2 or more than `MOST_CITIES` points.
    """
    if not 2 <= points.shape[1] <= MOST_CITIES:
        raise ValueError(f"points: expected 2 to {MOST_CITIES} points for exact tours, got {points.shape[1]}")
    return np.concatenate([_solve(points[start : start + _SLICE]) for start in range(0, len(points), _SLICE)])


def _solve(points: np.ndarray) -> np.ndarray:
    between = distances(points.astype(np.float64))
    batch, others = len(points), points.shape[1] - 1
    inner, home = between[:, 1:, 1:], between[:, 0, 1:]
    cost = np.full((batch, 2**others, others), np.inf)
    for j in range(others):
        cost[:, 1 << j, j] = home[:, j]
    for size in range(2, others + 1):
        sets = np.array([sum(1 << j for j in chosen) for chosen in combinations(range(others), size)])
        for j in range(others):
            having = sets[(sets >> j) & 1 == 1]
            cost[:, having, j] = (cost[:, having ^ (1 << j)] + inner[:, None, :, j]).min(-1)
    rows = np.arange(batch)
    left = np.full(batch, 2**others - 1)
    last = (cost[:, -1] + home).argmin(-1)
    order = [last]
    for _ in range(others - 1):
        left = left ^ (1 << last)
        last = (cost[rows, left] + inner[rows, :, last]).argmin(-1)
        order.append(last)
    path = np.stack(order, 1) + 1
    turned = np.where(path[:, :1] < path[:, -1:], path, path[:, ::-1])
    return np.concatenate([np.zeros((batch, 1), dtype=np.int64), turned], 1)
