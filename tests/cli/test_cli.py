"""The command line: what it prints, what its JSON holds, and how it ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import attnlab
import attnlab.channel_mixers
import attnlab.models
import attnlab.objectives
import attnlab.positions
import attnlab.reducers
import attnlab.tasks
from attnlab.cli.app import COMMANDS, app
from attnlab.cli.describe import cost_text, example, find
from attnlab.core.registry import all_registries
from attnlab.papers import papers
from attnlab.papers.coverage import coverage
from attnlab.tasks.files import MissingDataError

KINDS = tuple(all_registries())


def run(*arguments: str, code: int = 0) -> str:
    """Standard output of a command that ends with ``code``."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stdout


def fails(*arguments: str) -> str:
    """The one line on standard error of a command that was used badly."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("attnlab: ")
    return lines[0]


def test_every_mixer_is_listed_with_its_promises():
    lines = {line.split()[0]: line for line in run("list").splitlines()[1:-1]}
    assert list(lines) == attnlab.list_mixers()
    for name, line in lines.items():
        supports = attnlab.mixer_info(name).supports
        assert supports.causal in line.split() and cost_text(supports.cost) in line.split()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--causal"], {"causal": True}),
        (["--no-causal"], {"causal": False}),
        (["--streaming"], {"streaming": True}),
        (["--no-streaming", "--cross"], {"streaming": False, "cross": True}),
        (["--grid", "2"], {"grid": 2}),
        (["--family", "linear"], {"family": "linear"}),
        (["*net*"], {"pattern": "*net*"}),
        (["net"], {"pattern": "*net*"}),
    ],
)
def test_filters_are_those_of_list_mixers(arguments, wanted):
    assert [row["name"] for row in json.loads(run("list", *arguments, "--json"))] == attnlab.list_mixers(**wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_json_of_a_listing_is_complete(kind):
    rows = {row["name"]: row for row in json.loads(run("list", "--kind", kind, "--json"))}
    registry = all_registries()[kind]
    assert list(rows) == registry.names()
    for name, row in rows.items():
        info = registry.info(name)
        assert (row["kind"], row["family"], row["paper"], row["summary"]) == (kind, info.family, info.paper, info.summary)
        assert [option["name"] for option in row["options"]] == [option.name for option in info.options]
        assert ("supports" in row) == (kind == "mixer")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in all_registries()[kind].names()])
def test_everything_that_is_registered_can_be_explained(kind, name):
    text = run("info", name, "--kind", kind)
    entry = all_registries()[kind].get(name)
    data = json.loads(run("info", name, "--kind", kind, "--json"))
    assert name in text and example(entry) in text.replace("\n", "")
    assert "$" not in text and "\\mathrm" not in text
    for option in data["options"]:
        assert f" {option['name']} " in text
        assert option["description"], f"{name} does not say what {option['name']} is"
    assert (data["paper"] or {}).get("slug") == entry.info.paper
    if getattr(entry.factory, "source", ""):
        with pytest.raises(MissingDataError, match="ATTNLAB_DATA"):
            eval(data["example"], {"attnlab": attnlab})
    elif "..." not in data["example"]:
        assert eval(data["example"], {"attnlab": attnlab}) is not None


def test_info_reads_like_the_definition():
    text = run("info", "softmax")
    assert "oᵢ = ∑ⱼ softmaxⱼ(d^(-1/2) qᵢᵀ kⱼ + bᵢⱼ) vⱼ" in text
    assert "num_kv_heads" in text and "Supports" in text and "Proven" in text


def test_papers_are_counted_and_filtered():
    everything = json.loads(run("papers", "--json"))
    implemented = json.loads(run("papers", "--implemented", "--json"))
    missing = json.loads(run("papers", "--missing", "--json"))
    built = [row.paper.slug for row in coverage() if row.implemented]
    assert everything["counts"]["papers"] == len(everything["papers"]) == len(papers())
    assert [row["slug"] for row in implemented["papers"]] == built
    assert len(missing["papers"]) == len(papers()) - len(built) == everything["counts"]["missing"]
    last = run("papers", "--implemented").splitlines()[-1]
    assert last.startswith(f"{len(papers())} papers: {len(built)} implemented")


def test_one_paper_by_slug_and_by_number():
    data = json.loads(run("papers", "deltanet", "--json"))
    assert data["things"] == ["mixer:delta_net", "schedule:delta_hybrid"] and data["bibtex"].startswith("@misc{deltanet,")
    assert set(data["tiers"]["mixer:delta_net"]) | set(data["missing"]["mixer:delta_net"]) == {"T1", "T2", "T3", "T5"}
    assert json.loads(run("papers", str(data["index"]), "--json")) == data
    assert "@misc{deltanet," in run("papers", "deltanet")


def test_bad_usage_is_one_line_that_helps():
    assert "'delta_net'" in fails("info", "deltanet")
    assert "'delta_net'" in fails("info", "deltanet", "--kind", "mixer")
    assert "'mixer'" in fails("list", "--kind", "mixr")
    assert "--kind mixer" in fails("list", "--kind", "task", "--causal")
    assert "'list'" in fails("lst")
    assert "'deltanet'" in fails("papers", "delta-net")
    assert "0 to 234" in fails("papers", "999")


def test_an_option_that_does_not_exist_ends_with_2():
    result = CliRunner().invoke(app, ["list", "--colour"])
    assert result.exit_code == 2 and "--colour" in result.stderr


def test_help_teaches_every_command_by_an_example():
    overview = run("--help")
    for name in COMMANDS:
        assert f" {name} " in overview
        text = run(name, "--help")
        assert f"attnlab {name}" in text.split("Usage:")[1].split("\n", 1)[1], f"{name} --help has no example"


def test_errors_keep_their_traceback_on_request(monkeypatch):
    monkeypatch.setenv("ATTNLAB_TRACEBACK", "1")
    result = CliRunner().invoke(app, ["info", "deltanet"])
    assert isinstance(result.exception, attnlab.UnknownNameError)


def test_a_process_of_its_own_fits_the_terminal_and_imports_no_more_than_it_needs():
    heavy = "[name for name in ('plotly', 'sklearn', 'jinja2', 'attnlab.compare', 'attnlab.training') if name in sys.modules]"
    code = f"import atexit, sys\natexit.register(lambda: print({heavy}, file=sys.stderr))\nfrom attnlab.cli import main\nmain()"
    command = [sys.executable, "-c", code, "list", "--streaming"]
    environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    names = [line.split()[0] for line in done.stdout.splitlines()[1:-1]]
    assert names == attnlab.list_mixers(streaming=True)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_version_is_that_of_the_package():
    assert run("--version") == f"attnlab {importlib.metadata.version('attnlab')}\n"


def test_names_are_found_among_all_kinds():
    assert find("rotary").info.kind == "position"
    assert find("softmax").info.kind == "mixer"


@pytest.mark.parametrize(("exponent", "text"), [(1.0, "n"), (2.0, "n²"), (1.5, "n^1.5"), (0.0, "n⁰")])
def test_cost_in_words(exponent, text):
    assert cost_text(exponent) == text
