"""What linear attention's weights can tell of a query: its direction alone, or its length too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.claims.cells import Cells
from attnlab.claims.quantity import Measured, over
from attnlab.core.catalog import create_mixer
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer

SAME = 1e-9
"""Difference of weights, relative to their mean, below which they are the same in float64."""


def weights_of(
    mixer: str, options: Mapping[str, Any], q: Float[Tensor, "1 1 n d"], k: Float[Tensor, "1 1 m d"]
) -> Float[Tensor, "n m"]:
    """The weights that a mixer of one head gives the keys ``k`` for the queries ``q``, before any map of its features."""
    made = create_mixer(mixer, q.shape[-1], 1, dtype=torch.float64, **dict(options))
    if not isinstance(made, AttentionMixer):
        raise TypeError(f"mixer: expected one with queries, keys and values, got {mixer!r}")
    with torch.no_grad():
        return made.attend(q, k, made.identity(k), Masks(), None)[0, 0]


def collinear(
    cells: Cells, *, linear: Mapping[str, Any], injective: Mapping[str, Any], head_dim: int, keys: int, queries: int, draws: int
) -> Measured:
    """Whether queries of one direction and different lengths get different weights.

    A pair of queries q and t q, t from [1.5, 4], is confused where no weight differs by more than `SAME` of the mean weight.

    Quantities: "linear_confused" and "injective_confused", shares of confused pairs; "linear_difference" and
    "injective_difference", the largest difference of a pair's weights in units of the mean weight, its mean over pairs.

    Args:
        cells: keeps each draw.
        linear: mixer ("name") and options of the quotient.
        injective: the same of what is said to be injective.
        head_dim: width of queries and keys.
        keys: number of keys.
        queries: number of pairs.
        draws: random keys and queries.
    """

    def measure(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(1, 1, queries, head_dim, generator=generator, dtype=torch.float64)
        k = torch.randn(1, 1, keys, head_dim, generator=generator, dtype=torch.float64)
        t = 1.5 + 2.5 * torch.rand(queries, 1, generator=generator, dtype=torch.float64)
        found = {}
        for label, subject in (("linear", linear), ("injective", injective)):
            name, options = split(subject)
            apart = (weights_of(name, options, t * q, k) - weights_of(name, options, q, k)).abs().amax(-1) * keys
            found[f"{label}_confused"] = float((apart < SAME).double().mean())
            found[f"{label}_difference"] = float(apart.mean())
        return found

    settings = {"linear": dict(linear), "injective": dict(injective), "head_dim": head_dim, "keys": keys, "queries": queries}
    runs = _draws(cells, "collinear queries", settings, draws, measure)
    return Measured({name: over([run[name] for run in runs]) for name in runs[0]}, {"draws": runs})


def sharpness(
    cells: Cells,
    *,
    linear: Mapping[str, Any],
    aware: Mapping[str, Any],
    softmax: Mapping[str, Any],
    head_dim: int,
    keys: int,
    lengths: Sequence[float],
    draws: int,
) -> Measured:
    """How the ratio of two weights grows with the length of the query's features.

    The query has positive features f; the mechanisms with features get t f, softmax attention t q. The two keys are those of the
    largest weight and of the smallest that linear attention weighs no less than the mean. With r(t) their ratio, the growth is
    $\\ln r(t_{max}) / \\ln r(t_{min})$: 1 for a constant ratio, $t_{max} / t_{min}$ for an exponential.

    Quantities: "linear", "aware", "softmax", the growths; "slower", softmax's less aware's; "rises", the share of draws whose
    aware ratio rises at every step of the length.

    Args:
        cells: keeps each draw.
        linear: mixer ("name") and options of the quotient.
        aware: the same of the mechanism that heeds the length.
        softmax: the same of softmax attention.
        head_dim: width of queries and keys.
        keys: number of keys.
        lengths: t, rising.
        draws: random keys and queries.
    """

    def measure(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        features = torch.rand(1, 1, 1, head_dim, generator=generator, dtype=torch.float64) + 0.1
        k = torch.randn(1, 1, keys, head_dim, generator=generator, dtype=torch.float64)
        first = weights_of(*split(linear), features_to_query(features), k)[0]
        strong, weak = int(first.argmax()), int(first.where(first >= 1.0 / keys, torch.inf).argmin())
        ratios: dict[str, list[float]] = {}
        for label, subject in (("linear", linear), ("aware", aware), ("softmax", softmax)):
            ratios[label] = []
            for t in lengths:
                q = t * features if label == "softmax" else features_to_query(t * features)
                row = weights_of(*split(subject), q, k)[0]
                # Of softmax the two keys are those that it weighs most and least: only its own order makes a ratio above 1.
                pair = (row.max(), row.min()) if label == "softmax" else (row[strong], row[weak])
                ratios[label].append(float((pair[0] / pair[1]).log()))
        rises = all(later > earlier for earlier, later in pairwise(ratios["aware"]))
        return {"log_ratios": ratios, "rises": float(rises)}

    settings = {"linear": dict(linear), "aware": dict(aware), "softmax": dict(softmax), "head_dim": head_dim, "keys": keys}
    runs = _draws(cells, "sharpness", {**settings, "lengths": list(lengths)}, draws, measure)
    growths = {name: [run["log_ratios"][name][-1] / run["log_ratios"][name][0] for run in runs] for name in runs[0]["log_ratios"]}
    quantities = {name: over(values) for name, values in growths.items()}
    quantities["slower"] = over([fast - slow for fast, slow in zip(growths["softmax"], growths["aware"], strict=True)])
    quantities["rises"] = over([run["rises"] for run in runs])
    return Measured(quantities, {"lengths": list(lengths), "draws": runs})


def features_to_query(features: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """The q with elu(q) + 1 equal to positive ``features``."""
    return torch.where(features < 1.0, features.log(), features - 1.0)


def split(subject: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of a table with the key "name"."""
    return subject["name"], {key: value for key, value in subject.items() if key != "name"}


def _draws(cells: Cells, label: str, settings: Mapping[str, Any], draws: int, measure: Any) -> list[dict[str, Any]]:
    """One result for each seed from 0."""

    def one(seed: int) -> dict[str, Any]:
        return cells(f"{label}, draw {seed}", {**settings, "seed": seed}, lambda: measure(seed))

    return [one(seed) for seed in range(draws)]
