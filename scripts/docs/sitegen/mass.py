"""How much of dense attention's mass sparse mechanisms keep: the tables of ``docs/data/attention_mass.json``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnlab import list_mixers, mixer_info
from sitegen import prose

DATA = Path(__file__).parents[3] / "docs" / "data" / "attention_mass.json"
FAMILIES = ("local", "partitioned", "sparse")
NEARLY_ALL = 0.999
"""Shares of pairs above it are all of them: weights of trained layers that are as good as zero are rounded to it."""


def load(path: Path = DATA) -> dict[str, Any]:
    """The recorded measurements by source; nothing without a file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean, and half of the range where it shows."""
    half = f"{(max(values) - min(values)) / 2:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {half}" if float(half) else "")


def shape(setup: dict[str, Any]) -> str:
    """Form and size of a source's tokens, in words."""
    tokens = f"{setup['tokens']:,} tokens in a row" if setup["grid"] is None else " x ".join(map(str, setup["grid"])) + " tokens"
    return f"{tokens}, {'causal' if setup['causal'] else 'not causal'}"


def fits(name: str, setup: dict[str, Any]) -> bool:
    """Whether a mixer takes a source's tokens in its form."""
    supports = mixer_info(name).supports
    rank = 1 if setup["grid"] is None else len(setup["grid"])
    return rank in supports.grid and supports.causal != ("no" if setup["causal"] else "always")


def note(rows: Sequence[dict[str, Any]]) -> str:
    """What a reader must know of a mechanism's numbers."""
    kept = [row[kind] for row in rows for kind in ("random", "trained")]
    if all(one["same"] for one in kept):
        return "all: dense attention here"
    if all(one["pairs"] > NEARLY_ALL for one in kept):
        return "every key, with other weights than dense attention's"
    return ""


def of_mechanisms(entry: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """A row a seed for each mechanism of a source; those that could not be measured have a reason."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in entry["seeds"].values():
        for name, row in seed["mixers"].items():
            found.setdefault(name, []).append(row)
    return found


def source_table(entry: dict[str, Any]) -> str:
    """What is known of a source, and a row for each mechanism that was measured on it."""
    setup, seeds = entry["setup"], list(entry["seeds"].values())
    heads = [value for seed in seeds for value in seed["trained"]["entropy"]]
    plain = [value for seed in seeds for value in seed["random"]["entropy"]]
    bits = spread([seed["trained"]["bits"] for seed in seeds])
    head = f"heads from {min(heads):.2f} to {max(heads):.2f}"
    steps = sum(stage[2] for stage in setup["stages"])
    lines = [
        f"{steps:,} steps to {bits} bits on held-out tokens; seeds: {len(seeds)}. Entropy over that of equal weights: "
        f"trained {statistics.mean(heads):.2f} ({head}), random {statistics.mean(plain):.2f}.",
        "",
        "| mechanism | pairs used | mass, random | mass, trained | overlap, trained | |",
        "|---|--:|--:|--:|--:|---|",
    ]
    rows = of_mechanisms(entry)
    for name in (name for family in FAMILIES for name in list_mixers(family=family)):
        measured = [row for row in rows.get(name, []) if "reason" not in row]
        if not measured:
            continue
        pairs = spread([row["trained"]["pairs"] for row in measured], 3)
        cells = [spread([row[kind][key] for row in measured]) for kind, key in COLUMNS]
        lines.append(f"| [`{name}`](mechanisms/{name}.md) | {pairs} | {' | '.join(cells)} | {note(measured)} |")
    return "\n".join(lines)


COLUMNS = (("random", "mass"), ("trained", "mass"), ("trained", "overlap"))


def reasons(data: dict[str, Any]) -> dict[str, str]:
    """Why a mechanism of the families has no row anywhere; for every one that has none."""
    found = {}
    for name in (name for family in FAMILIES for name in list_mixers(family=family)):
        rows = [row for entry in data.values() for row in of_mechanisms(entry).get(name, [])]
        if any("reason" not in row for row in rows):
            continue
        if rows:
            found[name] = "; ".join(dict.fromkeys(row["reason"] for row in rows))
        elif any(fits(name, entry["setup"]) for entry in data.values()):
            found[name] = "not measured yet"
        else:
            found[name] = "takes none of these shapes"
    return found


def mass_tables() -> str:
    """A section for each source, and one for what has no row."""
    data, lines = load(), []
    for entry in (entry for entry in data.values() if entry["seeds"]):
        setup = entry["setup"]
        lines += ["", f"### {setup['says'][0].upper()}{setup['says'][1:]}: {shape(setup)}", "", source_table(entry)]
    lines += ["", "### What has no row", "", "| mechanism | because |", "|---|---|"]
    lines += [f"| [`{name}`](mechanisms/{name}.md) | {prose.cell(why)} |" for name, why in reasons(data).items()]
    return "\n".join(lines)
