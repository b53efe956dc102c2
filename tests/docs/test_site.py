"""The documentation builds without a network, has a page for everything registered, and opens without a complaint."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import attnlab
import browser
from attnlab.core.registry import all_registries
from attnlab.papers import papers

ROOT = Path(__file__).parents[2]
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src", "object": "data"}
NOT_LOADED = {"canonical", "prev", "next", "alternate"}


class Resources(HTMLParser):
    """What a page loads, and the ids and the text that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        if tag == "link" and (values.get("rel") or "") in NOT_LOADED:
            return
        if (address := values.get(LOADED.get(tag, ""))) is not None:
            self.loaded.append(address)

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: Path) -> Resources:
    parser = Resources()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "GOMP_SPINCOUNT": "20000"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_mixer_has_a_page_with_its_options_and_pictures(site):
    gallery = (site / "mechanisms" / "index.html").read_text(encoding="utf-8")
    for name in attnlab.list_mixers():
        page = read(site / "mechanisms" / name / "index.html")
        info = attnlab.mixer_info(name)
        assert all(option.name in page.text for option in info.options), name
        assert {"definition", "options", "supports", "proof", "cost-against-length", "paper"} <= page.ids
        assert info.paper is None or f"@misc{{{info.paper}," in page.text
        assert any(f"maps/{name}-0-0.png" in address for address in page.loaded)
        assert (site / "mechanisms" / "maps" / f"{name}-0-0.png").read_bytes().startswith(b"\x89PNG")
        assert f'href="{name}/"' in gallery


def test_everything_else_that_is_registered_has_a_section(site):
    for kind, registry in all_registries().items():
        if kind != "mixer" and registry.package.startswith("attnlab."):  # other tests have registries of their own
            assert set(registry.names()) <= read(site / "reference" / f"{kind}s" / "index.html").ids
    for folder in (ROOT / "src" / "attnlab" / "ops").iterdir():
        if (folder / "__init__.py").exists():
            assert folder.name in read(site / "reference" / "ops" / "index.html").ids


def test_every_paper_has_a_row(site):
    text = read(site / "papers" / "index.html").text
    assert all(paper.slug in text for paper in papers())


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_missing(site):
    for page in site.rglob("*.html"):
        for address in read(page).loaded:
            parts = urlsplit(address)
            assert not parts.scheme and not parts.netloc, f"{page.relative_to(site)} loads {address}"
            place = site if parts.path.startswith("/") else page.parent  # 404.html is served at any depth
            assert (place / unquote(parts.path).lstrip("/")).exists(), f"{page.relative_to(site)}: there is no {address}"
    for sheet in site.rglob("*.css"):
        outside = re.findall(r"(?:@import\s+|url\()\s*[\"']?(?:https?:)?//[^)\"']*", sheet.read_text(encoding="utf-8"))
        assert not outside, f"{sheet.relative_to(site)} loads {outside}"


def test_every_equation_is_mathml(site):
    count = 0
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        count += text.count("<math ")
        body = re.sub(r"<(code|script|style|math)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert not re.search(r"MathMark|\$\$|\\(frac|sum|mathrm|top)|\{\{|\{%", body), page.relative_to(site)
    assert count > 2 * len(attnlab.list_mixers())


@pytest.mark.parametrize("page", ["", "mechanisms/", "mechanisms/delta_net/", "mechanisms/focal_modulation/"])
def test_pages_open_without_a_complaint(site, page):
    with browser.served(site) as (address, missing):
        assert browser.console_errors(f"{address}/{page}") == []
    assert missing == []


FILTER = """
const names = () => [...document.querySelectorAll("#gallery > .card")]
  .filter((card) => card.offsetParent !== null)
  .map((card) => card.querySelector(".card-name").textContent);
const set = (id, value) => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
};
const found = { all: names() };
set("gallery-text", "DELTA net");
found.text = names();
found.count = document.getElementById("gallery-count").textContent;
document.querySelector("#gallery-filter [type=reset]").click();
await new Promise((done) => setTimeout(done, 50));
found.reset = names();
set("gallery-family", "linear");
found.family = names();
set("gallery-family", "");
for (const name of ["causal", "bounded"]) document.querySelector(`#gallery-filter [value=${name}]`).click();
found.supports = names();
document.body.dataset.found = JSON.stringify(found);
"""


def test_the_gallery_shows_what_is_asked_for(site, tmp_path):
    folder = tmp_path / "mechanisms"
    folder.mkdir()
    (tmp_path / "assets").symlink_to(site / "assets")
    (folder / "index.html").write_bytes((site / "mechanisms" / "index.html").read_bytes())
    page, _ = browser.played(folder / "index.html", FILTER)
    found = json.loads(unescape(re.findall(r'data-found="([^"]*)"', page)[0]))
    assert sorted(found["all"]) == sorted(found["reset"]) == sorted(attnlab.list_mixers())
    assert "delta_net" in found["text"] and len(found["text"]) < 10
    assert found["count"] == f"{len(found['text'])} of {len(found['all'])} mechanisms"
    assert sorted(found["family"]) == sorted(attnlab.list_mixers(family="linear"))
    assert sorted(found["supports"]) == sorted(attnlab.list_mixers(causal=True, state="bounded"))
    labelled = re.findall(r"<label[^>]*>[^<]*<(input|select)\b", page)
    assert len(labelled) >= len(re.findall(r'<(?:input|select)[^>]*(?:id="gallery|name="supports")', page)) > 2
