"""What pages written by hand can say between double braces: live numbers, and lists of the mechanisms that qualify."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from attnlab import list_mixers
from attnlab.compare import list_suites, load_suite
from attnlab.papers.evidence import TIERS
from sitegen import facts, prose
from sitegen.mass import mass_tables

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
"""Programs that pages show and the tests run."""


def fill(markdown: str, page: str) -> str:
    """A page's Markdown with its macros expanded; ``page`` is its path, from which links lead."""
    here = posixpath.dirname(page)

    def mixers(**wanted: object) -> str:
        names = list_mixers(**wanted)  # type: ignore[arg-type]
        return ", ".join(f"[`{n}`]({posixpath.relpath(f'mechanisms/{n}.md', here or '.')})" for n in names) or "none yet"

    env = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    env.globals |= {
        "n": facts.numbers(),
        "mixers": mixers,
        "example": lambda name: (EXAMPLES / name).read_text(encoding="utf-8").rstrip(),
        "command": command,
        "tier_table": tier_table,
        "thumbnails": thumbnails,
        "report_picture": report_picture,
        "law_tables": law_tables,
        "supports_table": supports_table,
        "mass_tables": mass_tables,
        "suite_table": suite_table,
    }
    return env.from_string(markdown).render()


def command(name: str) -> str:
    """A set-up command of the README: what its fenced block after ``<!-- command: name -->`` holds."""
    text = (EXAMPLES.parents[1] / "README.md").read_text(encoding="utf-8")
    match = re.search(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```", text, re.DOTALL)
    if match is None:
        raise ValueError(f"README.md: expected a fenced block after <!-- command: {name} -->, found none")
    return match[1]


def thumbnails() -> str:
    """The first map of every mixer, small, each a link to its page."""
    link = '<a class="thumb" href="mechanisms/{0}/"><img src="mechanisms/maps/{0}-0-0.png" alt="" width="36" height="36">{0}</a>'
    return "\n".join(['<div class="thumbs" markdown="0">', *map(link.format, list_mixers()), "</div>"])


def report_picture() -> str:
    """The picture of a report, once there is one in ``docs/images``."""
    exists = (EXAMPLES.parent / "images" / "report.png").exists()
    return "![A report of attnlab compare: mechanisms ranked on three tasks](images/report.png)" if exists else ""


def tier_table() -> str:
    """The tiers, and how many mixers reach each with how many cases."""
    numbers = facts.numbers()
    lines = ["| tier | proves | mixers | cases |", "|---|---|--:|--:|"]
    for tier, meaning in TIERS.items():
        held = numbers["tiers"][tier]
        lines.append(f"| {tier} | {prose.cell(meaning)} | {held['mixers']} of {numbers['mixers']} | {held['cases']} |")
    return "\n".join(lines)


def law_tables() -> str:
    """A section a law, with its checks."""
    lines = []
    for number, law, checks in facts.laws():
        lines += ["", f"### {f'{number}. ' if number else ''}{law.capitalize()}", "", "| check | demands |", "|---|---|"]
        lines += [f"| `{check.name}` | {prose.cell(check.summary)} |" for check in checks]
    return "\n".join(lines)


def supports_table() -> str:
    """The promises and their meaning."""
    lines = [f"| `{name}` | {prose.cell(text)} |" for name, text in facts.promise_meanings().items()]
    return "\n".join(["| promise | meaning |", "|---|---|", *lines])


def suite_table() -> str:
    """The suites of `attnlab compare` with what each is about, what it trains on, and its size."""
    lines = ["| suite | | tasks | mechanisms | seeds |", "|---|---|---|--:|--:|"]
    for suite in map(load_suite, list_suites()):
        tasks = ", ".join(f"`{choice.label}`" for choice in suite.tasks) or "none: layers are timed"
        lines.append(f"| `{suite.name}` | {prose.cell(suite.summary)} | {tasks} | {len(suite.mixers)} | {suite.seeds} |")
    return "\n".join(lines)
