"""The parts of the documentation's generator, and the README, which it keeps in line with the registry."""

from __future__ import annotations

import importlib
import re
import sys
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "docs"))

import readme  # noqa: E402
from sitegen import facts, gallery, mathml, pages, plot, png, prose, timings  # noqa: E402
from sitegen.pictures import TOKENS, pictures  # noqa: E402

import attnlab  # noqa: E402
from attnlab.core.catalog import mixers  # noqa: E402

MATHML = "{http://www.w3.org/1998/Math/MathML}"


def test_displayed_sums_have_their_limits_below():
    root = ET.fromstring(mathml.to_mathml(r"\sum_{j \le i} a_j", display=True))
    assert root.find(f".//{MATHML}munder") is not None
    assert ET.fromstring(mathml.to_mathml(r"\sum_j a_j", display=False)).find(f".//{MATHML}munder") is None


def test_equations_are_cut_at_wide_spaces_outside_of_brackets():
    assert mathml.split(r"a = b, \qquad c = \left(d \quad e\right) \quad f_{g \quad h}") == [
        "a = b,",
        r"c = \left(d \quad e\right)",
        r"f_{g \quad h}",
    ]


def test_equations_pass_markdown_unharmed_and_code_is_left_alone():
    text = "With `$PATH` and $x_i$, costs 3 $ a piece:\n\n$$y * z * w$$\n\n```sh\necho $HOME $USER\n```\n"
    hidden, found = mathml.hide(text)
    assert len(found) == 2 and "`$PATH`" in hidden and "echo $HOME $USER" in hidden and "3 $ a piece" in hidden
    word, display = found
    html = mathml.reveal(f"<p>With {word}, and</p><p>{display}</p>", found)
    assert 'class="nobr"' in html and 'class="equation"' in html and html.count("<math") == 2 and "MathMark" not in html


def test_prose_is_escaped_where_it_is_no_code_and_no_equation():
    text = prose.escape("a_b * c <= d, ``x_y``, `z*`, $w_i$ | e")
    assert text == r"a\_b \* c &lt;= d, `x_y`, `z*`, $w_i$ \| e"


def test_a_heat_map_holds_sign_and_size():
    data = png.heat_map(np.array([[1.0, -1.0, 0.0]]))
    rows = zlib.decompress(data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8])
    assert rows[0] == 0 and rows[1:] == bytes([*png.POSITIVE, 255, *png.NEGATIVE, 255, *png.POSITIVE, 0])


def test_a_plot_puts_the_slower_one_higher():
    svg = plot.log_log([256, 512], {"a": [1e-3, 2e-3], "b": [4e-3, 8e-3]}, "times")
    heights = [[float(point.split(",")[1]) for point in line.split()] for line in re.findall(r'points="([^"]*)"', svg)]
    assert heights[0][0] > heights[0][1] > heights[1][1] and heights[0][0] > heights[1][0]


@pytest.mark.parametrize(("seconds", "text"), [(4.2e-4, "0.42 ms"), (0.0131, "13.1 ms"), (0.2345, "234 ms"), (1.23, "1.23 s")])
def test_durations(seconds, text):
    assert plot.duration(seconds) == text


@pytest.mark.parametrize("name", attnlab.list_mixers())
def test_every_mixer_has_a_picture_of_its_promises(name):
    first, *others = pictures(name)
    assert (first.title == "Mixing matrix") == attnlab.mixer_info(name).supports.mixing_matrix
    assert all(len(picture.files) == len(picture.labels) for picture in (first, *others))
    width, height = (int.from_bytes(first.files[0][at : at + 4], "big") for at in (16, 20))
    assert width == height == TOKENS


def test_the_recorded_times_are_of_mixers_that_exist_and_pass_the_gate():
    data = timings.load()
    assert set(data["mixers"]) <= set(attnlab.list_mixers())
    for name, row in data["mixers"].items():
        assert ("forward" in row) == row["gate"]["passed"], name
        assert all(len(row[key]) == len(data["lengths"]) for key in ("forward", "training") if key in row)


def test_the_readme_lists_what_is_registered():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.filled(text) == text, "run python scripts/docs/readme.py"


def test_the_readme_has_two_commands_that_set_up():
    text = readme.README.read_text(encoding="utf-8")
    marked = re.findall(r"<!-- command: (\w+) -->\n```sh\n(.+)\n```", text)
    assert [name for name, _ in marked] == ["run", "test"]
    assert text.count("```sh") == 2 and all(command.startswith("python3 -m venv") for _, command in marked)


@pytest.fixture
def examples(monkeypatch):
    """The examples can be imported; what they register is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    monkeypatch.setattr(mixers, "_entries", dict(mixers._entries))
    yield
    sys.modules.pop("running_mean", None)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/start.md"])
def test_the_examples_of_a_page_run(page, examples):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert blocks and "mixer" in names


def test_a_new_mechanism_gets_its_page_by_being_registered(examples):
    importlib.import_module("running_mean")
    page = pages.mixer_page("running_mean")
    assert "# `running_mean`" in page and r"$y_i = W_o \frac{1}{i + 1} \sum_{j \le i} W_v x_j$" in page
    assert "time_mixers.py running_mean" in page and "`dtype`" in page
    assert "running_mean" in facts.families()["recurrent"] and "running_mean" in pages.gallery_page()


def test_the_mechanism_that_the_guide_writes_keeps_the_laws(examples):
    from running_mean import RunningMean

    report = attnlab.check(RunningMean)
    assert report.passed, str(report)
    assert {"mask", "causal", "streaming", "state", "cost"} <= set(report.counts())


def test_the_gallery_has_a_card_for_every_mixer_with_what_it_supports():
    cards = {card.name: card for card in gallery.cards()}
    assert set(cards) == set(attnlab.list_mixers())
    for name, (_, wanted) in gallery.CAPABILITIES.items():
        having = {card.name for card in cards.values() if name in card.supports}
        assert set(attnlab.list_mixers(**wanted)) <= having, name
    assert "two-sided" in cards["window"].supports and "two-sided" not in cards["delta_net"].supports
    page = pages.gallery_page()
    assert page.count('class="card"') == len(cards)
    assert page.count("not timed") == sum(not card.curve for card in cards.values())


def test_a_curve_says_its_times_and_what_was_not_timed_has_none():
    times = [{"seconds": 1e-3, "baseline": 2e-3}, {"seconds": 2e-3, "baseline": 8e-3}]
    svg = gallery.curve("x", [256, 1024], times, (1e-3, 8e-3))
    assert "1 ms at 256 tokens, 2 ms at 1,024; softmax 2 ms and 8 ms" in svg
    ours, theirs = ([float(p.split(",")[1]) for p in line.split()] for line in re.findall(r'points="([^"]*)"', svg))
    assert ours[0] > ours[1] > theirs[1] and gallery.curve("softmax", [256, 1024], times, (1e-3, 8e-3)).count("<polyline") == 1
    assert gallery.curve("x", [256], [], (1e-3, 1.0)) == "" and gallery.span({}) == (1e-3, 1.0)
