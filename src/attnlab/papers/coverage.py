"""What of each paper is implemented and proven here, read from the registries and the test evidence; nothing is typed in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from attnlab.core.registry import Entry, all_registries
from attnlab.papers.catalog import Paper, paper, papers
from attnlab.papers.evidence import TIERS, Evidence, load


@runtime_checkable
class EntrySource(Protocol):
    """The part of `attnlab.core.registry.Registry` that coverage reads."""

    def entries(self) -> Sequence[Entry[Any]]:
        """All entries, each with a ``name`` and the ``info.papers`` that it implements (slugs)."""
        ...


@dataclass(frozen=True)
class CoverageRow:
    """A paper, and what the library has of it.

    Attributes:
        paper: the paper.
        things: what is registered as implementing it, as ``"<kind>:<name>"``, sorted.
        tiers: for each of ``things`` the tiers that hold, sorted.
        partial: which of ``things`` are a part of what the paper has, and not its mechanism.
        missing: for each of ``things`` the tiers that apply (`applicable_tiers`) and do not hold, sorted.
    """

    paper: Paper
    things: tuple[str, ...]
    tiers: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, tuple[str, ...]]
    partial: frozenset[str] = frozenset()

    @property
    def implemented(self) -> bool:
        """True when something registered implements the paper."""
        return bool(self.things)

    @property
    def in_part(self) -> bool:
        """True when there are parts of the paper and not its mechanism."""
        return self.implemented and set(self.things) == self.partial

    @property
    def proven(self) -> bool:
        """True when something implements the paper's mechanism, and no tier that applies to what there is of it is missing."""
        return self.implemented and not self.in_part and not any(self.missing.values())


def applicable_tiers(paper: Paper, kind: str) -> tuple[str, ...]:
    """The tiers that a thing of registry ``kind`` can be asked for.

    T1 is asked of mixers alone, T4 of models alone, T5 of what can be trained by itself; T3 where the authors' code was recorded,
    and not of what has no output of its own (schedules, search spaces) or is another order of the same work (executions).
    """
    other = kind in ("schedule", "search_space", "execution")
    left_out = set() if paper.recorded and not other else {"T3"}
    left_out |= set() if kind == "mixer" else {"T1"}
    left_out |= set() if kind == "model" else {"T4"}
    left_out |= set() if kind in ("mixer", "model") else {"T5"}
    return tuple(tier for tier in TIERS if tier not in left_out)


def coverage(registries: Mapping[str, EntrySource] | None = None, evidence: Evidence | None = None) -> list[CoverageRow]:
    """One row a paper, by index.

    Args:
        registries: registries by kind; those of the library by default.
        evidence: what the tests have proven; the package's own by default.

    Raises:
        UnknownNameError: something is registered for a paper that the catalogue does not have.
    """
    sources: Mapping[str, EntrySource] = all_registries() if registries is None else registries
    proofs = load() if evidence is None else evidence
    implementing: dict[str, list[tuple[str, str]]] = defaultdict(list)
    parts = set()
    for kind, registry in sources.items():
        for entry in registry.entries():
            for slug in entry.info.papers:
                implementing[paper(slug).slug].append((kind, entry.name))
            parts |= {f"{kind}:{entry.name}"} if entry.info.partial else set()
    return [_row(subject, sorted(implementing[subject.slug]), proofs, parts) for subject in papers()]


def _row(subject: Paper, entries: Sequence[tuple[str, str]], proofs: Evidence, parts: set[str]) -> CoverageRow:
    tiers, missing = {}, {}
    for kind, name in entries:
        thing = f"{kind}:{name}"
        tiers[thing] = tuple(tier for tier, proof in sorted(proofs.get(thing, {}).items()) if proof.holds)
        missing[thing] = tuple(tier for tier in applicable_tiers(subject, kind) if tier not in tiers[thing])
    return CoverageRow(subject, tuple(tiers), tiers, missing, frozenset(parts & set(tiers)))
