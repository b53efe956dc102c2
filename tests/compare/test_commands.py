"""The commands compare, bench and report: output, exit codes, and what bad usage is told."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from attnlab.cli.app import app
from attnlab.compare.progress import duration, time_left
from attnlab.compare.report.labels import Point, place_labels
from attnlab.compare.report.words import bytes_text, count_text, listing, plain_text, seconds_text

SUITE = """
mixers = ["softmax", "sigmoid"]
seeds = 1
learning_rates = [0.003]
[[tasks]]
name = "recall"
options = { seq_len = 16, num_pairs = 2, vocab_size = 12, eval_examples = 16 }
budget = { steps = 2, batch_size = 4, parameters = 6000, depth = 1 }
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_compare_and_report(tmp_path):
    suite, out = tmp_path / "mine.toml", tmp_path / "out"
    suite.write_text(SUITE)
    done = run("compare", "--suite", suite, "--out", out, "--workers", 2)
    assert done.exit_code == 0, done.output
    assert "softmax" in done.stdout and "report.html" in done.stdout.replace("\n", "")  # long paths are wrapped
    assert "one seed tells no two mechanisms apart" in " ".join(done.stdout.split())  # however the terminal wraps it
    again = run("compare", "--suite", suite, "--out", out, "--json")
    found = json.loads(again.stdout)
    assert found["ok"] and found["counts"]["finished"] == 8 and found["control"][0]["holds"] is True
    assert "8 of 8 cells were finished before" in again.stderr
    other = run("report", out, "--out", tmp_path / "other", "--json")
    assert other.exit_code == 0 and json.loads(other.stdout)["scores"] == found["scores"]
    assert (tmp_path / "other" / "report.html").exists()


def test_fresh_sets_the_ledger_aside(tmp_path):
    suite = tmp_path / "mine.toml"
    suite.write_text(SUITE)
    for flags in ((), ("--fresh",)):
        assert run("compare", "--suite", suite, "--out", tmp_path / "out", "--mixers", "softmax", *flags).exit_code == 0
    assert len(list((tmp_path / "out").glob("ledger*.sqlite"))) == 2


def test_a_failed_cell_is_exit_code_1_and_is_tried_again(tmp_path, monkeypatch):
    import attnlab.compare.work as work

    suite = tmp_path / "mine.toml"
    suite.write_text(SUITE)

    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(work, "train", broken)
        done = run("compare", "--suite", suite, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "RuntimeError: planted" in done.stdout
    assert run("compare", "--suite", suite, "--out", tmp_path / "out").exit_code == 0


def test_ctrl_c_gives_the_cell_back(tmp_path, monkeypatch):
    import attnlab.compare.work as work

    suite = tmp_path / "mine.toml"
    suite.write_text(SUITE)

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "train", stopped)
        done = run("compare", "--suite", suite, "--out", tmp_path / "out")
    assert done.exit_code == 130 and "goes on from there" in done.stderr
    found = run("report", tmp_path / "out", "--json")
    assert found.exit_code == 1 and set(json.loads(found.stdout)["counts"]) == {"pending", "expected"}


def test_bench():
    done = run("bench", "softmax", "pooling", "--lengths", "16,32", "--dim", 16, "--num-heads", 2, "--seconds", 0, "--json")
    assert done.exit_code == 0, done.output
    softmax, pooling = json.loads(done.stdout)["mixers"]
    assert softmax["passed"] and softmax["causal"] and not pooling["causal"]
    assert set(softmax["times"]["training"]) == {"16", "32"}


def test_bench_of_a_wrong_mixer_is_exit_code_1(monkeypatch):
    from attnlab.ops.attention import ATTENTION, reference

    def wrong(q, k, v, **options):
        return reference.attention(q, k, v, **options) * 1.0001

    monkeypatch.setitem(ATTENTION.implementations, "eager", wrong)
    done = run("bench", "softmax", "--lengths", "16", "--dim", 16, "--num-heads", 2, "--seconds", 0)
    assert done.exit_code == 1 and "not correct" in done.stdout and " ms" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "--suite", "quik"), "did you mean 'quick'"),
        (("compare", "--mixers", "softmaxx"), "did you mean 'softmax'"),
        (("compare", "--tasks", "digit"), "did you mean 'digits'"),
        (("compare", "--seeds", "0"), "seeds: expected at least 1"),
        (("compare", "--workers", "-1"), "workers: expected at least 0"),
        (("compare", "--lrs", "fast"), "--lrs: expected numbers"),
        (("compare", "--lrs", "-1"), "learning_rates: expected positive numbers"),
        (("compare", "--mixers", ","), "expected names"),
        (("bench", "delta_net", "--no-causal"), "does not support causal=False"),
        (("bench", "softmax", "--lengths", "64,32"), "rising order"),
        (("bench", "softmax", "--dim", "30"), "multiple of num_heads"),
        (("bench", "sofmax"), "did you mean 'softmax'"),
        (("report", "no_such_folder"), "expected a ledger"),
    ],
)
def test_bad_usage_is_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_help_has_an_example():
    for command in ("compare", "bench", "report"):
        assert "attnlab " + command in run(command, "--help").stdout


def test_time_left_counts_what_is_expected():
    assert time_left([], {"sweep": 4, "timing": 1}, 2) == pytest.approx(4 * 6.0 / 2 + 6.0)
    assert [duration(s) for s in (12.3, 95.0, 7800.0)] == ["12 s", "2 min", "2 h 10 min"]


def test_labels_do_not_overlap():
    points = [
        Point(70.0, 50.0, "softmax"),
        Point(78.0, 52.0, "mamba"),
        Point(70.0, 50.0, "twin"),
        Point(118.0, 50.0, "a long name"),
    ]
    placed = place_labels(points, 200.0, 100.0)
    assert placed[0] == "middle left", "to its right is another point"
    assert placed[1] is not None
    assert place_labels([Point(5.0, 5.0, "a name too long for the picture")], 60.0, 60.0) == [None]


def test_words():
    assert plain_text(r"Map $\phi(x) = \mathrm{elu}(x)$ of ``x``.") == "Map φ(x) = elu(x) of x."
    assert [bytes_text(n) for n in (None, 12, 2048, 3 * 2**20)] == ["–", "12 B", "2 KiB", "3 MiB"]
    assert [seconds_text(s) for s in (8.5e-5, 0.0024, 3.14)] == ["85 µs", "2.4 ms", "3.14 s"]
    assert [count_text(n) for n in (950, 56_700, 3_200_000)] == ["950", "56.7 k", "3.2 M"]
    assert listing("abc") == "a, b and c" and listing("abcdefgh", 3) == "a, b and 6 more"
