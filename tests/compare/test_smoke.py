"""One run of the smoke suite, from cells to the page that a browser opens."""

from __future__ import annotations

import csv
import html
import html.parser
import json
import re
import shutil

import pytest
import torch

import browser
from attnlab.compare import Citation, compare, make_report
from attnlab.compare.ledger import Ledger
from attnlab.compare.run import LEDGER
from attnlab.compare.suites import MixerChoice, Suite, TaskChoice, Timing

MIXERS = ("softmax", "mamba", "pooling")
CITATIONS = {"mamba": Citation("Mamba <b>", 2023, "2312.00752")}


def suite():
    """Three mixers, one of which has no causal form, on two tiny tasks."""
    recall = {"seq_len": 16, "num_pairs": 2, "vocab_size": 12, "eval_examples": 32}
    small = {"steps": 6, "batch_size": 8, "parameters": 6000, "depth": 1}
    return Suite(
        "tiny",
        (TaskChoice("recall", recall, small), TaskChoice("digits", {"patch": 2}, small)),
        tuple(MixerChoice(name) for name in MIXERS),
        learning_rates=(0.003, 0.01),
        timing=Timing((32, 64), (64,), dim=16, num_heads=2, seconds=0.001, pairs=2),
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on tiny tensors wait for each other more than they work
    yield compare(suite(), tmp_path_factory.mktemp("smoke"), citations=CITATIONS, command="attnlab compare --suite tiny")
    torch.set_num_threads(threads)


def test_everything_runs_and_ties(results):
    summary = results.summary
    assert results.ok, (summary.failures, summary.ties, [dict(cost.gate) for cost in summary.costs.values()])
    assert summary.counts == {"finished": 37, "expected": 37}
    assert [tie.holds for tie in summary.ties] == [True, True]
    assert all(0 < tie.distance < 1e-4 for tie in summary.ties), "two backends ran, and rounded differently"
    assert {score.state for score in summary.scores} == {"scored", "excluded"}
    pooling = summary.score("recall", "pooling")
    assert pooling.state == "excluded" and "no causal form" in pooling.reason
    score = summary.score("digits", "mamba")
    assert len(score.test) == 2 and score.rate in (0.003, 0.01) and abs(score.parameters / 6000 - 1) < 0.02
    assert len({round(value, 6) for value in score.sweep[0]}) == 2


def test_the_test_split_is_read_once_a_chosen_run(results):
    tests = [row for row in results.rows if row.member.role == "test"]
    assert len(tests) == 5 * 2
    for row in tests:
        spec = row.member.cell.spec
        assert spec["learning_rate"] == results.summary.score(row.member.task, row.member.mixer).rate


def test_softmax_and_its_control_share_everything_but_the_backend(results):
    specs = {row.member.role: row.member.cell.spec for row in results.rows if row.member.role == "control"}
    control = specs["control"]
    twin = [
        row for row in results.rows if row.member.role == "sweep" and {**row.member.cell.spec, "backend": "reference"} == control
    ]
    assert len(twin) == 1 and twin[0].member.cell.spec["backend"] == "auto"


def test_a_second_run_computes_nothing(results):
    with Ledger(results.folder / LEDGER) as ledger:
        before = len([event for event in ledger.events() if event["kind"] == "claimed"])
    again = compare(suite(), results.folder, citations=CITATIONS, command="attnlab compare --suite tiny")
    with Ledger(results.folder / LEDGER) as ledger:
        after = len([event for event in ledger.events() if event["kind"] == "claimed"])
    assert before == after == 37
    assert again.summary.scores == results.summary.scores


def test_tables_hold_every_run(results):
    with (results.folder / "results.csv").open() as file:
        training = list(csv.DictReader(file))
    assert len(training) == 10 + 5 + 10 + 2
    assert {row["mixer"] for row in training} == set(MIXERS)
    with (results.folder / "timings.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(MIXERS) * 2 * 2 + 2 * 2  # two of them decode
    everything = json.loads((results.folder / "results.json").read_text())
    assert everything["summary"]["ok"] is True
    assert everything["facts"]["machine"]["torch"] == torch.__version__


class Links(html.parser.HTMLParser):
    """Collects what a page would fetch, and the links that it offers."""

    def __init__(self):
        super().__init__()
        self.fetched, self.offered, self.scripts, self.ids = [], [], 0, []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.scripts += tag == "script" and attributes.get("type") is None
        if tag == "a":
            self.offered.append(attributes["href"])
        elif tag in ("script", "link", "img", "iframe", "source", "object"):
            self.fetched += [attributes[name] for name in ("src", "href", "data") if name in attributes]


def test_the_report_is_whole_and_fetches_nothing(results):
    page = results.report.read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert links.fetched == []
    assert not re.search(r"@import|url\(", page.split("</style>")[0])
    assert page.count("plotly.js v") == 1 and links.scripts == 2
    assert "https://arxiv.org/abs/2312.00752" in links.offered and "Mamba &lt;b&gt;" in page
    assert len(links.ids) == len(set(links.ids))
    inner = [link[1:] for link in links.offered if link.startswith("#")]
    assert inner and set(inner) <= set(links.ids)
    for name in MIXERS:
        assert f"card-{name}" in links.ids
    for words in (
        "What to take from this",
        "attnlab compare --suite tiny",
        "no causal form",
        "nearest centroid",
        "Equivalence control",
    ):
        assert words in page
    assert "speed-mamba" in links.ids and "speed-pooling" in links.ids and "speed-softmax" not in links.ids


def test_figures_are_json_that_no_script_end_cuts(results):
    page = results.report.read_text(encoding="utf-8")
    figures = re.findall(r'<script type="application/json" data-for="([^"]+)">(.*?)</script>', page, re.DOTALL)
    assert len(figures) >= 2 + 4 + 2 + 2 + 4
    for _, text in figures:
        assert {"data", "layout"} <= set(json.loads(text))


def test_the_report_of_a_failed_gate_shows_no_speed(results, tmp_path):
    shutil.copy(results.folder / LEDGER, tmp_path / LEDGER)
    with Ledger(tmp_path / LEDGER) as ledger:
        key = next(row.key for row in ledger.rows(1) if row.member.role == "timing" and row.member.mixer == "mamba")
        bad = {"gate": {"passed": False, "error": "RuntimeError: planted"}, "causal": True, "threads": 1}
        ledger._connection.execute("UPDATE results SET payload = ? WHERE key = ?", (json.dumps(bad), key))
    found = make_report(tmp_path, run=1)
    assert not found.ok and not found.summary.trusted
    page = found.report.read_text(encoding="utf-8")
    assert "speed-mamba" not in page and "RuntimeError: planted" in page and "Do not trust this run yet" in page


def test_a_report_can_be_made_of_an_unfinished_run(results, tmp_path):
    shutil.copy(results.folder / LEDGER, tmp_path / LEDGER)
    with Ledger(tmp_path / LEDGER) as ledger:
        gone = [row.key for row in ledger.rows(1) if row.member.role in ("seed", "test", "timing", "control")]
        for key in gone:
            for table in ("weights", "results"):
                ledger._connection.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
            ledger._connection.execute("UPDATE cells SET status = 'pending' WHERE key = ?", (key,))
    found = make_report(tmp_path, run=1)
    assert not found.ok and not found.summary.complete and found.summary.trusted
    assert "The run is not complete" in found.report.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="run: expected one of"):
        make_report(tmp_path, run=99)
    with pytest.raises(FileNotFoundError, match="expected a ledger"):
        make_report(tmp_path / "nowhere")


def test_a_browser_draws_the_report_without_an_error(results, tmp_path):
    page = results.report.read_text(encoding="utf-8")
    opened = tmp_path / "page.html"
    opened.write_text(page.replace("<details>", "<details open>"), encoding="utf-8")
    dom, said = browser.played(opened, "", width=1200, height=9000)
    assert said == []
    assert dom.count("js-plotly-plot") >= page.count('class="plot"') > 10, "every picture is drawn"


CONTROLS = """
const form = document.querySelector('#results .filter'), pair = document.querySelector('#pair .filter');
const rows = () => [...document.querySelectorAll('.sortable tbody:first-of-type tr')];
const shown = () => rows().filter((row) => !row.hidden).map((row) => row.dataset.mixer).join(' ');
const change = (control, value, kind) => { control.value = value; control.dispatchEvent(new Event(kind, {bubbles: true})); };
const found = {};
change(form.flag, 'streaming', 'input');
found.flag = shown();
found.cards = [...document.querySelectorAll('.card')].filter((card) => !card.hidden).length;
change(form.flag, '', 'input'); change(form.text, 'POOL', 'input');
found.text = shown(); found.told = form.querySelector('output').textContent;
form.reset(); await new Promise((done) => setTimeout(done, 20));
found.reset = shown();
const button = document.querySelector('.sortable thead button'); button.click(); found.sorted = shown();
button.click(); found.reversed = shown();
const tip = document.getElementById('tip'), link = rows()[0].querySelector('a');
link.dispatchEvent(new MouseEvent('mouseenter')); found.tip = tip.hidden ? '' : tip.textContent;
link.dispatchEvent(new MouseEvent('mouseleave')); found.gone = tip.hidden;
change(pair.second, 'pooling', 'change');
found.pair = [...document.querySelectorAll('table.pair thead th')].map((cell) => cell.textContent).join(' ').trim();
found.rows = document.querySelectorAll('table.pair tbody tr').length;
found.better = document.querySelectorAll('table.pair td.better').length;
const pixels = (canvas) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
found.painted = [...document.querySelectorAll('canvas')].every((canvas) => pixels(canvas).some((value) => value > 0));
found.canvases = document.querySelectorAll('canvas').length;
document.body.dataset.found = JSON.stringify(found);
"""


def test_the_controls_of_the_report_work(results):
    dom, said = browser.played(results.report, CONTROLS)
    assert said == []
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert (found["flag"], found["cards"]) == ("softmax mamba", 2)
    assert (found["text"], found["told"]) == ("pooling", "1 of 3 shown")
    assert found["reset"] == "softmax mamba pooling"
    assert (found["sorted"], found["reversed"]) == ("mamba pooling softmax", "softmax pooling mamba")
    assert "softmax" in found["tip"].lower() and "streaming" in found["tip"] and found["gone"] is True
    assert found["pair"] == "softmax pooling" and found["rows"] >= 10 and found["better"] >= 3
    assert found["painted"] is True and found["canvases"] == 5, "one a trained mixer and layer"
