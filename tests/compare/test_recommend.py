"""Recommendations from what ledgers hold: what qualifies, how a number is known, and the order."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from attnlab import list_mixers
from attnlab.cli.app import app
from attnlab.cli.recommend import read_bytes
from attnlab.compare import compare
from attnlab.compare.recommend import Need, estimate, find_ledgers, recommend
from attnlab.compare.suites import MixerChoice, Suite, TaskChoice, Timing

MIXERS = ("softmax", "linear", "sliding_window", "pooling")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    recall = {"seq_len": 16, "num_pairs": 2, "vocab_size": 12, "eval_examples": 32}
    suite = Suite(
        "tiny",
        (TaskChoice("recall", recall, {"steps": 4, "batch_size": 8, "parameters": 6000, "depth": 1}),),
        tuple(MixerChoice(name, {"window": 16} if name == "sliding_window" else {}) for name in MIXERS),
        learning_rates=(0.01,),
        control=False,
        timing=Timing((32, 64), (64,), dim=16, num_heads=2, seconds=0.001, pairs=2),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = tmp_path_factory.mktemp("runs")
    compare(suite, found / "tiny")
    yield found
    torch.set_num_threads(threads)


def test_what_cannot_do_it_is_not_named(folder):
    found = recommend(Need(64, causal=True, streaming=True), find_ledgers([folder]))
    assert {entry.mixer for entry in found.suggestions} == {"softmax", "linear", "sliding_window"}
    qualified = set(list_mixers(causal=True, streaming=True))
    assert set(found.unmeasured) == qualified - {"softmax", "linear", "sliding_window"}
    assert "pooling" not in found.unmeasured


def test_quality_comes_first_and_then_time(folder):
    found = recommend(Need(64, causal=True, task="recall"), find_ledgers([folder]))
    places = [(entry.score.rank.best, entry.ratio.value) for entry in found.suggestions]
    assert len(places) == 3 and places == sorted(places)
    assert found.task is not None and found.task.metric == "accuracy"
    by_time = [entry.ratio.value for entry in recommend(Need(64, causal=True), find_ledgers([folder])).suggestions]
    assert by_time == sorted(by_time)


def test_numbers_say_how_they_are_known(folder):
    ledgers = find_ledgers([folder])
    known = {length: {entry.seconds.known for entry in recommend(Need(length), ledgers).suggestions} for length in (64, 50, 4096)}
    assert known == {64: {"measured"}, 50: {"between"}, 4096: {"beyond"}}


def test_what_does_not_fit_is_set_apart(folder):
    need = Need(1 << 20, causal=True, streaming=True, memory=2**20)
    found = recommend(need, find_ledgers([folder]))
    assert {entry.mixer for entry in found.too_large} == {"softmax"}, "its cache grows, the states of the others do not"
    state = next(entry for entry in found.suggestions if entry.mixer == "linear").memory
    assert state is not None and state.value < 10_000


def test_an_estimate_follows_power_laws():
    values = {n: 3e-6 * n**1.5 for n in (256, 512, 1024)}
    for length, known in ((700, "between"), (128, "beyond"), (10_000, "beyond")):
        found = estimate(values, length)
        assert found is not None and found.known == known and found.value == pytest.approx(3e-6 * length**1.5)
    assert estimate(values, 512).known == "measured"
    assert estimate({}, 5) is None and estimate({64: 2.0}, 128) is None
    assert estimate({64: 2.0}, 128, 1.0).value == 4.0


def test_bad_needs_are_refused(folder):
    with pytest.raises(ValueError, match="length: expected a positive number"):
        Need(0)
    with pytest.raises(ValueError, match="task: expected one of recall, got 'chess'"):
        recommend(Need(64, task="chess"), find_ledgers([folder]))
    with pytest.raises(ValueError, match="none, as no comparison has been run here"):
        recommend(Need(64, task="recall"), [])


@pytest.mark.parametrize(("text", "value"), [("8GiB", 8 * 2**30), ("500 MB", 500 * 2**20), ("1024", 1024), ("1.5k", 1536)])
def test_sizes_are_read(text, value):
    assert read_bytes(text) == value


def test_the_command(folder):
    def run(*arguments):
        return CliRunner().invoke(app, ["recommend", *arguments, "--ledger", str(folder)])

    found = run("--length", "100", "--causal", "--task", "recall")
    assert found.exit_code == 0
    assert all(text in found.output for text in ("qualify, not measured here", "≈", "rank"))
    data = json.loads(run("--length", "100", "--streaming", "--memory", "8GiB", "--json").output)
    assert data["suggestions"] and all(math.isfinite(entry["seconds"]["value"]) for entry in data["suggestions"])
    bad = run("--length", "100", "--memory", "much")
    assert bad.exit_code == 2 and "8GiB" in bad.output
