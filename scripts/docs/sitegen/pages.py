"""The generated pages: a path in the site for each, with its Markdown, and the pictures that they show."""

from __future__ import annotations

import inspect
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from attnlab import list_mixers, mixer_info
from attnlab.claims import claims, outcomes
from attnlab.cli.claims import claim_data, measured_text
from attnlab.cli.describe import cost_text, default_text, example, headline, proofs, verb
from attnlab.cli.docstrings import describe_arguments, parse
from attnlab.core.catalog import mixers
from attnlab.papers.catalog import citation, paper
from attnlab.papers.coverage import applicable_tiers
from attnlab.papers.evidence import TIERS
from sitegen import facts, gallery, prose, timings
from sitegen.parts import entry_part, op_modules
from sitegen.pictures import TOKENS, Picture, pictures
from sitegen.plot import duration, log_log

TEMPLATES = Path(__file__).parent / "templates"


@cache
def environment() -> Environment:
    """Templates that fail on a name that they do not know."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {"md": prose.escape, "sentence": prose.sentence, "cell": prose.cell, "code": prose.code, "body": prose.body}
    env.globals |= {"numbers": facts.numbers(), "tiers": TIERS}
    return env


def render(template: str, **values: Any) -> str:
    """A template with these values."""
    return environment().get_template(template).render(**values)


@cache
def mixer_pictures(name: str) -> tuple[Picture, ...]:
    """The pictures of a mixer, drawn once."""
    return tuple(pictures(name))


def picture_path(name: str, picture: int, index: int) -> str:
    """Where a map of a mixer lies in the site."""
    return f"mechanisms/maps/{name}-{picture}-{index}.png"


def generated() -> dict[str, str | bytes]:
    """Every generated file by its path in the site."""
    files: dict[str, str | bytes] = {}
    for name in list_mixers():
        files[f"mechanisms/{name}.md"] = mixer_page(name)
        for number, picture in enumerate(mixer_pictures(name)):
            files |= {picture_path(name, number, i): data for i, data in enumerate(picture.files)}
    files["mechanisms/index.md"] = gallery_page()
    files["papers.md"] = render("papers.md.j2", rows=sorted(facts.rows(), key=lambda row: (not row.implemented, row.paper.slug)))
    files["claims.md"] = claims_page()
    files["reference/ops.md"] = render("ops.md.j2", modules=op_modules())
    for kind, registry in facts.parts().items():
        entries = [entry_part(entry) for entry in registry.entries()]
        files[part_path(kind)] = render("part.md.j2", kind=kind, title=part_title(kind), verb=verb(kind), entries=entries)
    return files


def part_path(kind: str) -> str:
    """The page of a registry."""
    return f"reference/{kind}s.md"


def part_title(kind: str) -> str:
    """What that page is called."""
    return kind.replace("_", " ").capitalize() + "s"


def claims_page() -> str:
    """The claims ledger."""
    measured = outcomes()
    rows = [
        {**claim_data(claim, measured.get(name)), "measured_text": measured_text(claim, measured.get(name))}
        for name, claim in claims().items()
    ]
    counts = Counter(row["outcome"] for row in rows)
    return render("claims.md.j2", rows=rows, counts=list(counts.items()))


def gallery_page() -> str:
    """All mixers as cards, in the order of their families."""
    families = {family: len(names) for family, names in facts.families().items()}
    return render(
        "gallery.md.j2",
        cards=gallery.cards(),
        capabilities=gallery.CAPABILITIES,
        families=families,
        data=timings.load(),
        tokens=TOKENS,
    )


def mixer_page(name: str) -> str:
    """All that is known of a mixer."""
    entry, info = mixers.get(name), mixer_info(name)
    doc, said = parse(inspect.getdoc(entry.factory)), describe_arguments(entry.factory)
    subject = paper(info.paper) if info.paper else None
    return render(
        "mixer.md.j2",
        name=name,
        info=info,
        doc=doc,
        headline=headline(entry),
        badges=facts.badges(info),
        cost=cost_text(info.supports.cost),
        pictures=mixer_pictures(name),
        picture_path=picture_path,
        example=example(entry),
        promises=facts.promise_rows(info),
        options=[(o.name, o.annotation, default_text(o), said.get(o.name, "")) for o in info.options],
        proofs=proofs("mixer", name),
        applicable=applicable_tiers(subject, "mixer") if subject else [t for t in TIERS if t not in ("T3", "T4")],
        paper=subject,
        sources=[(source, citation(source)) for source in map(paper, info.papers)],
        timing=timing_section(name),
    )


def timing_row(length: int, times: dict[str, Any]) -> dict[str, str]:
    """One length: both times, the ratio with its quartiles."""
    return {
        "length": f"{length:,}",
        "ours": duration(times["seconds"]),
        "theirs": duration(times["baseline"]),
        "ratio": f"{times['ratio']:.2f}",
        "quartiles": f"{times['ratio_low']:.2f} to {times['ratio_high']:.2f}",
    }


def timing_section(name: str) -> list[dict[str, Any]]:
    """For each direction: a sentence, a drawing, and rows of lengths with both times and their ratio; nothing if not timed."""
    data = timings.load()
    row, found = data["mixers"].get(name, {}), []
    for direction, title in (("forward", "Forward"), ("training", "Forward and backward")):
        times = row.get(direction)
        if not times:
            continue
        label = "softmax, causal" if row["causal"] else "softmax"
        series = {name: [t["seconds"] for t in times], label: [t["baseline"] for t in times]}
        if name == "softmax":
            del series[label]
        table = [timing_row(length, t) for length, t in zip(data["lengths"], times, strict=True)]
        found.append(
            {
                "title": title,
                "verdict": timings.verdict(data, name, "forward" if direction == "forward" else "training"),
                "plot": log_log(data["lengths"], series, f"{title}: time of {name} against tokens"),
                "table": table,
                "label": label,
                "data": data,
            }
        )
    return found
