"""Outcomes follow from their numbers, are sealed, and survive a kill."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnlab.claims import claim, claims, judge, outcomes, run_claims
from attnlab.claims.cells import Cells
from attnlab.claims.outcomes import is_stale, keep, settled, thresholds

FAST = "lightning-exact"


@pytest.mark.parametrize("name", list(outcomes()))
def test_every_outcome_of_the_package_follows_from_its_numbers(name):
    assert name in claims(), "an outcome without a claim: remove it by measuring again"
    subject, outcome = claim(name), outcomes()[name]
    assert not is_stale(subject, outcome), f"settings or thresholds have changed: attnlab claims run {name}"
    assert outcome.outcome == judge(subject, outcome.quantities)
    assert outcome.machine["cpu"] and outcome.date and outcome.version


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    threads = torch.get_num_threads()
    lines: list[str] = []
    (outcome,) = run_claims([FAST], cells=folder / "cells", outcomes=folder / "outcomes.json", say=lines.append)
    assert torch.get_num_threads() == threads
    return folder, outcome, lines


def test_a_run_writes_what_it_measured(measured):
    folder, outcome, lines = measured
    (kept,) = outcomes(folder / "outcomes.json").values()
    assert kept == outcome and kept.outcome == "reproduced" and kept.quantities["error"].count == 5
    assert lines[0].startswith(f"[1/1] {FAST}: ") and lines[-1] == f"[1/1] {FAST}: reproduced"


def test_the_next_run_keeps_the_finished_cells(measured):
    folder, outcome, _ = measured
    lines: list[str] = []
    removed = sorted((folder / "cells").iterdir())[0]
    removed.unlink()  # as if killed before this one
    (again,) = run_claims([FAST], cells=folder / "cells", outcomes=folder / "outcomes.json", say=lines.append)
    assert sum("kept from before" in line for line in lines) == 4
    assert again.quantities == outcome.quantities


def test_an_edit_by_hand_is_seen(measured, tmp_path):
    text = (measured[0] / "outcomes.json").read_text()
    path = tmp_path / "outcomes.json"
    path.write_text(text.replace('"reproduced",', '"partly",', 1))
    with pytest.raises(ValueError, match="got a record that was edited"):
        outcomes(path)


def test_other_thresholds_or_settings_make_an_outcome_stale(measured):
    subject, outcome = claim(FAST), measured[1]
    assert not is_stale(subject, outcome)
    assert is_stale(claim("inline-injective"), outcome)


def test_keeping_one_outcome_leaves_the_others_that_still_stand(measured, tmp_path):
    path, outcome = tmp_path / "outcomes.json", measured[1]
    other = claim("inline-injective")
    standing = replace(outcome, claim=other.id, settings=settled(other), thresholds=thresholds(other))
    for kept in (standing, replace(outcome, claim="rala-rank"), replace(outcome, claim="gone"), outcome):
        keep(kept, path)
    assert list(outcomes(path)) == [other.id, FAST]


def test_a_cell_is_measured_once_and_whole(tmp_path):
    calls: list[int] = []

    def work() -> dict[str, float]:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"x": 1.5}

    with pytest.raises(KeyboardInterrupt):
        Cells(tmp_path)("a", {"n": 1}, work)
    assert list(tmp_path.iterdir()) == []
    cells = Cells(tmp_path)
    assert cells("a", {"n": 1}, work) == cells("a", {"n": 1}, work) == {"x": 1.5}
    assert len(calls) == 2
    assert cells("a", {"n": 2}, work) == {"x": 1.5} and len(calls) == 3
    with pytest.raises(ValueError, match="Out of range float"):
        cells("nan", {}, lambda: {"x": float("nan")})


def test_bad_arguments_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="unknown claim 'x'"):
        run_claims([FAST, "x"], cells=tmp_path, outcomes=tmp_path / "o.json")
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        run_claims([FAST], cells=tmp_path, outcomes=tmp_path / "o.json", threads=0)
    assert list(tmp_path.iterdir()) == []
