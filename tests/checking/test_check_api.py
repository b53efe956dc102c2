"""What `attnlab.check` takes and returns, and the command on top of it."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import attnlab
from attnlab.checking import ConformanceError, Record, Report
from attnlab.checking.draw import MASKS, Draw
from attnlab.checking.suite import PROMISES, Promise, conformance
from attnlab.cli.check import check as check_command
from attnlab.core.catalog import mixers
from checking.faults import OneStepLeak, WrongScale
from checking.toys import ToyAttention, ToyRecurrence

RIGHT = "causality_gradient"


def toy(**options: object) -> attnlab.Mixer:
    return ToyAttention(**options)


@pytest.mark.parametrize("target", [ToyAttention, toy, ToyAttention(8, 2, causal=True), "softmax"])
def test_targets(target: object) -> None:
    report = attnlab.check(target, only=[RIGHT, "determinism"])
    assert [record.status for record in report.records] == ["passed"] * 3
    assert [record.check for record in report.records] == ["builds", RIGHT, "determinism"]


def test_a_built_mixer_is_left_as_it_is() -> None:
    mixer = ToyAttention(8, 2, causal=True).train()
    before = {name: value.clone() for name, value in mixer.state_dict().items()}
    report = attnlab.check(mixer)
    assert report.passed, str(report)
    assert mixer.training
    assert all(torch.equal(value, before[name]) for name, value in mixer.state_dict().items())


def test_a_built_mixer_has_to_prove_what_its_form_can() -> None:
    report = attnlab.check(ToyAttention(8, 2))
    assert report.passed, str(report)
    assert {"cross", "permutation_equivariant"} <= set(report.counts())
    assert not {"causal", "streaming", "state"} & set(report.counts())


def test_a_promise_of_which_no_check_ran_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROMISES, "novelty", Promise(lambda supports: True))
    report = attnlab.check("softmax")
    assert [(record.check, record.detail) for record in report.failures] == [
        ("proves_novelty", "novelty is promised, but no check of it ran")
    ]


def test_global_state_is_left_as_it_is() -> None:
    torch.manual_seed(3)
    expected, threads = torch.rand(2), torch.get_num_threads()
    torch.manual_seed(3)
    attnlab.check(ToyRecurrence, only=["determinism", "randomness_is_declared"])
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == threads


def test_the_same_seed_says_the_same() -> None:
    first, again, other = (attnlab.check(WrongScale, only="precision_float64", seed=seed).failures for seed in (5, 5, 6))
    assert first[0].detail == again[0].detail
    assert first[0].detail != other[0].detail


def test_counts_and_data() -> None:
    report = attnlab.check(ToyRecurrence)
    promised = {name for name, promise in PROMISES.items() if promise.made(ToyRecurrence.info.supports)}
    assert set(report.counts()) == promised
    assert sum(report.counts().values()) == report.checks_run
    data = json.loads(json.dumps(report.to_dict()))
    assert data["passed"] is True
    assert data["records"][0]["check"] == "builds"
    assert data["target"] == "ToyRecurrence"


def test_raise_if_failed() -> None:
    attnlab.check(ToyAttention, only=RIGHT).raise_if_failed()
    with pytest.raises(ConformanceError, match=f"(?s)OneStepLeak: .* 1 failed.*{RIGHT} .*output 0 depends on input 1"):
        attnlab.check(OneStepLeak, only=RIGHT).raise_if_failed()


def test_expected_failures() -> None:
    fails = attnlab.check(OneStepLeak, only=RIGHT, expected_failures={RIGHT: "it looks ahead"})
    assert fails.passed
    assert fails.records[1].status == "expected_failure"
    assert fails.records[1].detail.startswith("it looks ahead (")
    passes = attnlab.check(ToyAttention, only=RIGHT, expected_failures={RIGHT: "it looks ahead"})
    assert not passes.passed
    assert "unexpectedly passes" in passes.records[1].detail
    idle = attnlab.check(ToyAttention, expected_failures={"generator": "draws elsewhere"})
    assert [record.check for record in idle.failures] == ["generator"]
    assert "did not run" in idle.failures[0].detail


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"only": "padding_lefft"}, attnlab.UnknownNameError, "did you mean 'padding_left'"),
        ({"profile": "thorugh"}, attnlab.UnknownNameError, "did you mean 'thorough'"),
        ({"expected_failures": {"causality": "x"}}, attnlab.UnknownNameError, "unknown check 'causality'"),
        ({"expected_failures": {RIGHT: " "}}, ValueError, "expected a reason"),
    ],
)
def test_bad_arguments(options: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        attnlab.check(ToyAttention, **options)


def test_bad_targets() -> None:
    with pytest.raises(attnlab.UnknownNameError, match="did you mean 'softmax'"):
        attnlab.check("sofmax")
    with pytest.raises(TypeError, match="expected a registered name"):
        attnlab.check(torch.nn.Linear)
    with pytest.raises(TypeError, match="expected none with a built mixer"):
        attnlab.check(ToyAttention(8, 2), options={"causal": True})


def test_options_choose_the_form() -> None:
    report = attnlab.check(ToyAttention, options={"causal": True, "num_heads": 2}, only=RIGHT)
    assert report.records[0].detail == "causal in (True,)"


def test_a_check_is_entered_once() -> None:
    def determinism(bench: object) -> str:
        return ""

    with pytest.raises(ValueError, match="in the suite already"):
        conformance(law=9, promise="contract")(determinism)
    with pytest.raises(ValueError, match="expected keys of LAWS"):
        conformance(law=10, promise="contract")


def test_table() -> None:
    report = Report("toy", "default", 0, (Record("a", "mask", "failed", "[red] is no markup", 0.1),))
    console = Console(width=120, file=io.StringIO())
    console.print(report)
    assert "[red] is no markup" in console.file.getvalue()


@given(n=st.integers(2, 40), seed=st.integers(0, 2**32), kind=st.sampled_from(MASKS))
def test_draws(n: int, seed: int, kind: str) -> None:
    draw = Draw(seed)
    mask = draw.mask(kind, 3, n)
    assert mask.any(dim=1).all()
    assert not mask.all(dim=1).any()
    if kind != "inside":
        edge = mask if kind == "right" else mask.flip(1)
        assert not (edge[:, 1:] & ~edge[:, :-1]).any()
    pieces = draw.split(n)
    assert sum(pieces) == n
    assert len(pieces) > 1
    assert min(pieces) > 0
    assert draw.pair_mask(2, 1, n, 3).any(dim=-1).all()


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(check_command)
    return app


def test_command_on_a_name(command: typer.Typer) -> None:
    result = CliRunner().invoke(command, ["softmax", "--only", "determinism", "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert "determinism" in result.stdout
    assert "passed" in result.stdout


def test_command_on_all(command: typer.Typer) -> None:
    result = CliRunner().invoke(command, ["--all", "--json", "--only", "flags_agree"])
    data = json.loads(result.stdout)
    assert list(data["mixers"]) == attnlab.list_mixers()
    assert data["summary"]["broken"].keys() == mixers.broken.keys()
    assert result.exit_code == (1 if mixers.broken else 0)


SOURCE = """
from attnlab import Supports
from attnlab.core.info import MixerInfo
from attnlab import Mixer

class Future(Mixer):
    \"\"\"Swaps the order of the tokens.\"\"\"
    info = MixerInfo("future", "mixer", "", "", None, (), Supports(causal="optional"))
    def __init__(self, dim, num_heads=8, *, causal=False, device=None, dtype=None):
        super().__init__(dim, num_heads, causal=causal)
    def mix(self, x, context, masks, grid):
        return x.flip(1)
"""


def test_command_on_a_file(command: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    result = CliRunner().invoke(command, [f"{path}:Future", "--json", "--only", "causality_*"])
    assert result.exit_code == 1, result.output
    data = json.loads(result.stdout)
    assert data["summary"]["failed"] == [f"{path}:Future"]
    failed = {record["check"] for record in data["mixers"][f"{path}:Future"]["records"] if record["status"] == "failed"}
    assert "causality_gradient" in failed
    missing = CliRunner().invoke(command, [f"{path}:Past"])
    assert missing.exit_code == 2
    assert "Future" in missing.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--all"),
        (["softmax", "--all"], "--all"),
        (["sofmax"], "softmax"),
        (["softmax", "--only", "padding_lefft"], "padding_left"),
        (["nowhere.py:Mixer"], "nowhere.py"),
        (["softmax", "--profile", "quick"], "profile"),
    ],
)
def test_command_used_badly(command: typer.Typer, arguments: list[str], says: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2, result.output
    assert says in result.output


def test_command_help(command: typer.Typer) -> None:
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0
    assert "attnlab check softmax" in result.stdout
