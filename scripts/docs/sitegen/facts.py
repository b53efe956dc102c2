"""What the pages say of the library as a whole, read from the registries, the papers and the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from attnlab import MixerInfo, Supports, list_mixers, mixer_info
from attnlab.checking import runner, suite
from attnlab.cli.describe import cost_text, headline
from attnlab.cli.docstrings import parse
from attnlab.cli.papers import counts
from attnlab.core.catalog import mixers
from attnlab.core.info import first_line
from attnlab.core.registry import Registry, all_registries
from attnlab.papers.coverage import CoverageRow, coverage
from attnlab.papers.evidence import TIERS, load

_FLAGS = ("cross", "mask", "pair_mask", "mixing_matrix", "associative", "dynamics", "permutation_equivariant", "varlen")


@cache
def rows() -> tuple[CoverageRow, ...]:
    """The coverage of the papers."""
    return tuple(coverage())


@cache
def parts() -> dict[str, Registry[Any]]:
    """The registries that are not of mixers, by kind."""
    return {kind: registry for kind, registry in all_registries().items() if kind != "mixer"}


def numbers() -> dict[str, Any]:
    """Counts: papers, mixers, parts of each kind, and for each tier how many mixers reach it with how many cases."""
    proofs = {name: load().get(f"mixer:{name}", {}) for name in list_mixers()}
    tiers = {}
    for tier in TIERS:
        held = [proof[tier] for proof in proofs.values() if tier in proof and proof[tier].holds]
        tiers[tier] = {"mixers": len(held), "cases": sum(proof.passed for proof in held)}
    kinds = {kind: len(registry.names()) for kind, registry in parts().items()}
    return {**counts(rows()), "mixers": len(proofs), "kinds": kinds, "tiers": tiers}


def families() -> dict[str, list[str]]:
    """Names of the mixers by family, both in order."""
    found: dict[str, list[str]] = {}
    for name in list_mixers():
        found.setdefault(mixer_info(name).family, []).append(name)
    return dict(sorted(found.items()))


def badges(info: MixerInfo) -> list[tuple[str, bool]]:
    """The promises as short labels, and whether each is made."""
    supports = info.supports
    causal = {"always": "always causal", "optional": "causal or not", "no": "causal"}[supports.causal]
    streaming = f"streams, state {'bounded' if supports.state == 'bounded' else 'grows'}" if supports.streaming else "streams"
    ranks = ", ".join(str(rank) for rank in sorted(supports.grid))
    flags = [(flag.replace("_", " "), bool(getattr(supports, flag))) for flag in _FLAGS]
    return [(causal, supports.causal != "no"), (streaming, supports.streaming), (f"grid rank {ranks}", True), *flags]


def promise_rows(info: MixerInfo) -> list[tuple[str, str, str]]:
    """Each field of `Supports` with its value for a mixer and what it means."""
    meaning = promise_meanings()
    return [(name, value_text(name, value), meaning.get(name, "")) for name, value in info.supports.as_dict().items()]


def promise_meanings() -> dict[str, str]:
    """What each promise says, by name."""
    return {**parse(Supports.__doc__).arguments, "varlen": first_line(Supports.varlen.__doc__)}


def value_text(name: str, value: Any) -> str:
    """A promise's value in words."""
    if name == "cost":
        return cost_text(value)
    if name == "tokens_option":
        return "none, any number" if value is None else str(value)
    if isinstance(value, frozenset):
        return ", ".join(str(item) for item in sorted(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def laws() -> list[tuple[int, str, Sequence[Any]]]:
    """Number and name of each law, with its checks, which the runner's modules have entered."""
    known = {module.__name__ for module in runner.MODULES}
    return [
        (n, law, [check for check in suite.CHECKS.values() if check.law == n and check.run.__module__ in known])
        for n, law in suite.LAWS.items()
    ]


def mixer_rows() -> list[dict[str, str]]:
    """A row a mixer, for tables: name, family, headline, causal, streaming, grid, cost, paper (title and year)."""
    titles = {row.paper.slug: f"{row.paper.title} ({row.paper.year})" for row in rows()}
    found = []
    for entry in mixers.entries():
        info = mixer_info(entry.name)
        supports = info.supports
        found.append(
            {
                "name": entry.name,
                "family": info.family,
                "headline": headline(entry),
                "causal": supports.causal,
                "streaming": f"yes, state {supports.state}" if supports.streaming else "no",
                "grid": value_text("grid", supports.grid),
                "cost": cost_text(supports.cost),
                "paper": titles.get(info.paper or "", ""),
            }
        )
    return found
