"""`attnlab info`: all that is known of one registered thing, readable in a terminal."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from attnlab.cli.console import console, plain_table, print_json
from attnlab.cli.describe import cost_text, default_text, entry_data, example, find, proofs
from attnlab.cli.docstrings import Doc, describe_arguments, parse
from attnlab.cli.latex import readable_text
from attnlab.core.info import MixerInfo, Supports
from attnlab.core.registry import Entry
from attnlab.papers.catalog import citation, paper
from attnlab.papers.coverage import applicable_tiers
from attnlab.papers.evidence import TIERS

_CODE = re.compile(r"(`+)(.+?)\1")


def info_command(
    name: Annotated[str, typer.Argument(help="A name that `attnlab list` gives.")],
    kind: Annotated[str | None, typer.Option(help="Where to look: one of the kinds that `attnlab list` takes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain one mechanism: equation, options, promises, proofs, paper.

    Example: attnlab info delta_net
    """
    entry = find(name, kind)
    if as_json:
        print_json(entry_data(entry))
        return
    out, doc = console(), parse(inspect.getdoc(entry.factory))
    family = f"{entry.info.family} " if entry.info.family not in ("", "none") else ""
    out.print(Text.assemble((entry.name, "bold cyan"), f"  {family}{entry.info.kind.replace('_', ' ')}"))
    for line in prose(doc):
        out.print(line)
    _print_options(out, entry, doc)
    if isinstance(entry.info, MixerInfo):
        _heading(out, "Supports")
        out.print(Padding(Text("\n".join(promises(entry.info.supports))), (0, 0, 0, 2), expand=False))
    for title, text in {**doc.notes, **{f"Raises {error}": when for error, when in doc.errors.items()}}.items():
        if title != "Args":
            _heading(out, title)
            out.print(Padding(styled(_flat(text)), (0, 0, 0, 2), expand=False))
    _print_proofs(out, entry)
    _heading(out, "Example")
    out.print(Text("  " + example(entry)), soft_wrap=True)


def prose(doc: Doc) -> Iterator[Text]:
    """Summary and body, a blank line before each paragraph, each displayed equation on its own."""
    for paragraph in (doc.summary, *doc.body):
        yield Text()
        if all(line.startswith("    ") for line in paragraph.splitlines()):
            yield Text(paragraph)
            continue
        for text, display in readable_text(paragraph):
            yield Text("    " + text, style="green") if display else styled(text)


def styled(text: str) -> Text:
    """Text with what stands between backquotes in another colour instead."""
    out, end = Text(), 0
    for match in _CODE.finditer(text):
        out.append(text[end : match.start()])
        out.append(match[2], style="cyan")
        end = match.end()
    return out.append(text[end:])


def promises(supports: Supports) -> list[str]:
    """The promises, one a line: those that are made, then those that are refused."""
    streaming = f"yes, the state {'is bounded' if supports.state == 'bounded' else 'grows with the tokens seen'}"
    lines = [
        f"causal: {supports.causal}",
        f"streaming: {streaming if supports.streaming else 'no'}",
        f"grid: rank {', '.join(str(rank) for rank in sorted(supports.grid))}",
        f"cost: {cost_text(supports.cost)} in time and memory",
        *([] if supports.tokens_option is None else [f"tokens: exactly as many as {supports.tokens_option} says"]),
    ]
    flags = {name: value for name, value in supports.as_dict().items() if isinstance(value, bool) and name != "streaming"}
    made = [name for name, promised in flags.items() if promised]
    return [
        *lines,
        f"also: {', '.join(made) or 'nothing'}",
        f"refuses: {', '.join(n for n in flags if n not in made) or 'nothing'}",
    ]


def _flat(text: str) -> str:
    return " ".join(part for part, _ in readable_text(text))


def _heading(out: Console, title: str) -> None:
    out.print()
    out.print(Text(title, style="bold"))


def _print_options(out: Console, entry: Entry[Any], doc: Doc) -> None:
    said = describe_arguments(entry.factory)
    _heading(out, "Options")
    table = plain_table("  name", "type", "default", "")
    table.columns[0].style = "cyan"
    table.columns[3].no_wrap = False
    for option in entry.info.options:
        kind = textwrap.shorten(option.annotation, 28, placeholder=" ...")
        table.add_row(Text("  " + option.name), Text(kind), Text(default_text(option)), styled(_flat(said.get(option.name, ""))))
    out.print(table)
    if "Args" in doc.notes:
        out.print(Padding(styled(_flat(doc.notes["Args"])), (0, 0, 0, 2), expand=False))


def _print_proofs(out: Console, entry: Entry[Any]) -> None:
    subject = paper(entry.info.paper) if entry.info.paper else None
    held = proofs(entry.info.kind, entry.name)
    _heading(out, "Proven")
    for tier, proof in held.items():
        out.print(Text(f"  {tier} {TIERS[tier]} ({proof.passed} {'case' if proof.passed == 1 else 'cases'})"))
    open_tiers = [tier for tier in applicable_tiers(subject, entry.info.kind) if tier not in held] if subject else []
    if open_tiers:
        out.print(Text(f"  not yet: {', '.join(open_tiers)}", style="dim"))
    elif not held:
        out.print(Text("  nothing yet", style="dim"))
    if entry.info.papers:
        _heading(out, "Paper" if len(entry.info.papers) == 1 else "Papers")
        for slug in entry.info.papers:
            out.print(Text(textwrap.indent(citation(paper(slug)).rstrip(), "  ")), soft_wrap=True)
