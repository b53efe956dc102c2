"""The tables of what sparse mechanisms keep of attention's mass."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "docs"))

from sitegen import mass

from attnlab import list_mixers, mixer_info

SETUP = {"says": "the next byte", "tokens": 2048, "causal": True, "grid": None, "stages": [[64, 32, 400], [2048, 1, 150]]}


def kept(share: float, *, pairs: float = 0.1, same: bool = False) -> dict[str, object]:
    return {"mass": share, "pairs": pairs, "overlap": share, "same": same}


def seed(trained: float) -> dict[str, object]:
    mixers = {
        "sliding_window": {"random": kept(0.2), "trained": kept(trained)},
        "block_span": {kind: kept(1.0, pairs=1.0, same=True) for kind in ("random", "trained")},
        "combiner": {kind: kept(1.0, pairs=1.0) for kind in ("random", "trained")},
        "grassmann": {"reason": "no single | map"},
    }
    return {"random": {"entropy": [0.9]}, "trained": {"entropy": [0.2, 0.6], "bits": 2.0}, "mixers": mixers}


@pytest.fixture
def data(monkeypatch):
    hidden = {**SETUP, "says": "hidden bytes", "causal": False}
    found = {"text": {"setup": SETUP, "seeds": {"0": seed(0.7), "1": seed(0.9)}}, "hidden": {"setup": hidden, "seeds": {}}}
    monkeypatch.setattr(mass, "load", lambda: found)
    return found


def test_a_row_has_means_and_half_the_range(data):
    text = mass.mass_tables()
    assert "### The next byte: 2,048 tokens in a row, causal" in text and "550 steps to 2.00 bits" in text
    assert "trained 0.40 (heads from 0.20 to 0.60), random 0.90" in text
    assert "| [`sliding_window`](mechanisms/sliding_window.md) | 0.100 | 0.20 | 0.80 ± 0.10 | 0.80 ± 0.10 |  |" in text


def test_what_keeps_all_says_how(data):
    lines = {line.split("`")[1]: line for line in mass.mass_tables().splitlines() if line.startswith("| [`")}
    assert "dense attention" in lines["block_span"] and "other weights" in lines["combiner"]


def test_every_sparse_mechanism_has_a_row_or_a_reason(data):
    why, rows = mass.reasons(data), mass.of_mechanisms(data["text"])
    assert why["grassmann"] == "no single | map" and r"no single \| map" in mass.mass_tables()
    assert why["quest"] == "not measured yet" and why["local_implicit"] == "takes none of these shapes"
    assert why["sparse_prefill"] == "not measured yet" and "hidden" not in mass.mass_tables().lower()
    names = {name for name in list_mixers() if mixer_info(name).family in mass.FAMILIES}
    measured = {name for name, found in rows.items() if "reason" not in found[0]}
    assert set(why) | measured == names and not set(why) & measured


def test_the_recorded_rows_are_of_mixers_that_exist():
    for entry in mass.load().values():
        for name, rows in mass.of_mechanisms(entry).items():
            assert mass.fits(name, entry["setup"])
            shares = [row[kind][key] for row in rows if "reason" not in row for kind, key in mass.COLUMNS]
            assert all(0 <= share <= 1 + 1e-4 for share in shares), name
