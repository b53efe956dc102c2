"""`attnlab claims`: the list, one claim, a run, and how it fails."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import attnlab.cli.claims as commands
from attnlab.claims import claims, outcomes
from attnlab.cli.app import app


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["claims", *arguments], env={"COLUMNS": "220"})
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_the_list_has_every_claim_with_its_outcome():
    rows = json.loads(run("--json"))
    assert [row["id"] for row in rows] == list(claims())
    text = run()
    for row in rows:
        assert row["id"] in text
        if row["id"] in outcomes():
            assert row["outcome"] == outcomes()[row["id"]].outcome and row["measured"]["seal"]
    assert text.splitlines()[-1].startswith(f"{len(rows)} claims: ")


def test_one_claim_is_shown_with_its_thresholds():
    text = run("show", "recall-linear")
    assert "lower end of gap >= 0.05" in text and "@misc{deltanet," in text


def test_what_is_not_yet_measured_says_why():
    waiting = [c for c in claims().values() if c.id not in outcomes() and c.pending]
    for subject in waiting:
        assert subject.pending in run("show", subject.id).replace("\n", " ")
    assert all(row["pending"] == "" for row in json.loads(run("--json")) if row["measured"])


def test_a_run_shows_what_it_measured(tmp_path):
    out = tmp_path / "outcomes.json"
    text = run("run", "lightning-exact", "--cells", str(tmp_path / "cells"), "--out", str(out))
    assert "reproduced" in text and list(outcomes(out)) == ["lightning-exact"]


def test_what_was_measured_otherwise_is_not_shown_as_an_outcome():
    subject = next(iter(outcomes().values()))
    other = next(c for c in claims().values() if c.id != subject.claim)
    assert commands.state(other, subject).startswith(commands.NOT_YET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rn"], "unknown action 'rn'; did you mean 'run'?"),
        (["recall-mamba"], "did you mean 'attnlab claims show recall-mamba'?"),
        (["show", "recall-mambo"], "did you mean 'recall-mamba'"),
        (["run", "nonsense!"], "unknown claim 'nonsense!'; known: "),
        (["run", "lightning-exact", "--threads", "0"], "threads: expected at least 1, got 0"),
    ],
)
def test_bad_usage_is_one_line_that_helps(arguments, message):
    (line,) = run(*arguments, code=2).splitlines()
    assert line.startswith("attnlab: ") and message in line


def test_a_stopped_run_says_how_to_go_on(monkeypatch):
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_claims", stop)
    assert "the same command goes on from there" in run("run", "lightning-exact", code=130)
