"""The catalogue of papers, its citations, and coverage computed from registries and evidence."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import pytest

from attnlab.core.errors import UnknownNameError
from attnlab.core.info import Info
from attnlab.core.registry import Entry
from attnlab.papers import Paper, citation, paper, papers
from attnlab.papers.coverage import applicable_tiers, coverage
from attnlab.papers.evidence import Proof, load, merge, write


def test_catalogue_is_whole_and_normalised():
    rows = papers()
    assert [row.index for row in rows] == list(range(235))
    for field in ("slug", "title"):
        assert max(Counter(getattr(row, field) for row in rows).values()) == 1, f"two papers share a {field}"
    for row in rows:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.slug), row
        assert row.title == " ".join(row.title.split()), row
        assert row.kind and row.family, row
        assert row.arxiv is None or re.fullmatch(r"\d{4}\.\d{5}", row.arxiv), row
        assert row.arxiv is None or row.year == 2000 + int(row.arxiv[:2]), row
        assert row.code is None or re.fullmatch(r"https?://[\w.-]+/[\w./-]+", row.code), row
    assert sum(row.reconstruction for row in rows) == 20
    assert not any(row.reconstruction and row.recorded for row in rows)


def test_catalogue_is_read_once():
    assert papers() is papers()


def test_paper_is_found_by_slug_and_by_index():
    assert paper(18) is paper("agent-attention")
    assert paper(18).arxiv == "2312.08874"


@pytest.mark.parametrize(
    ("wanted", "hint"), [("agent-atention", "'agent-attention'"), ("zzzz", "papers()"), (235, "0 to 234"), (-1, "0 to 234")]
)
def test_unknown_paper_is_refused_with_a_hint(wanted, hint):
    with pytest.raises(UnknownNameError, match=re.escape(hint)):
        paper(wanted)


def test_citation_carries_the_facts_and_escapes_latex():
    entry = citation(paper("ia-red2"))
    assert entry.startswith("@misc{ia-red2,\n")
    assert r"title = {{IA-RED\^{}2: Interpretability" in entry
    assert "year = {2021}" in entry
    assert "eprint = {2106.12620}" in entry
    assert all(citation(row).count("{") == citation(row).count("}") for row in papers())


def test_citation_without_a_preprint_gives_the_code_or_nothing():
    assert "url = {https://github.com/TrinhQuocNguyen/CORE-ReID}" in citation(paper("core-reid"))
    assert "eprint" not in citation(paper("far"))
    assert "url" not in citation(paper("far"))


@dataclass(frozen=True)
class FakeRegistry:
    papers_by_name: dict[str, str | None]

    def entries(self) -> list[Entry]:
        return [Entry(name, dict, Info(name, "fake", "", "", slug, ())) for name, slug in self.papers_by_name.items()]


HELD = Proof(2, 0, ("tests/a.py::test_b",))
FAILING = Proof(2, 1, ("tests/a.py::test_b",))


def test_coverage_reads_registries_and_evidence():
    registries = {
        "mixer": FakeRegistry({"agent": "agent-attention", "agent_plus": "agent-attention", "plain": None}),
        "model": FakeRegistry({"agent_tiny": "agent-attention"}),
    }
    evidence = {"mixer:agent": {"T1": HELD, "T2": FAILING}, "model:agent_tiny": {"T4": HELD}}
    rows = coverage(registries, evidence)
    assert [row.paper for row in rows] == list(papers())
    row = rows[18]
    assert row.things == ("mixer:agent", "mixer:agent_plus", "model:agent_tiny")
    assert row.tiers == {"mixer:agent": ("T1",), "mixer:agent_plus": (), "model:agent_tiny": ("T4",)}
    assert row.missing["mixer:agent"] == ("T2", "T3", "T5")
    assert row.missing["model:agent_tiny"] == ("T2", "T3", "T5")
    assert row.implemented
    assert not row.proven
    assert [row.paper.slug for row in rows if row.implemented] == ["agent-attention"]


def test_a_part_of_a_paper_does_not_prove_it():
    @dataclass(frozen=True)
    class Parts:
        def entries(self) -> list[Entry]:
            return [Entry("agent", dict, Info("agent", "position", "", "", "agent-attention", (), partial=True))]

    row = coverage({"position": Parts()}, {"position:agent": dict.fromkeys(("T2", "T3"), HELD)})[18]
    assert row.implemented and row.in_part and not any(row.missing.values())
    assert not row.proven


def test_a_paper_is_proven_when_every_applicable_tier_holds():
    evidence = {"mixer:agent": dict.fromkeys(("T1", "T2", "T3", "T5"), HELD)}
    assert coverage({"mixer": FakeRegistry({"agent": "agent-attention"})}, evidence)[18].proven


def test_equivalence_with_the_authors_is_asked_for_where_there_are_recordings():
    assert "T3" not in applicable_tiers(Paper(0, "a", "A", 2024), "mixer")
    recorded = Paper(0, "a", "A", 2024, recorded=True)
    assert applicable_tiers(recorded, "mixer") == ("T1", "T2", "T3", "T5")
    assert applicable_tiers(recorded, "model") == ("T2", "T3", "T4", "T5")
    assert applicable_tiers(recorded, "position") == ("T2", "T3")
    assert applicable_tiers(recorded, "schedule") == applicable_tiers(recorded, "execution") == ("T2",)


def test_coverage_refuses_a_registration_for_a_paper_that_is_not_there():
    with pytest.raises(UnknownNameError, match="'agent-attention'"):
        coverage({"mixer": FakeRegistry({"agent": "agent-atention"})}, {})


def test_coverage_of_the_library_itself():
    rows = coverage()
    assert len(rows) == 235
    assert all(set(row.tiers) == set(row.missing) == set(row.things) for row in rows)


def test_committed_evidence_loads_and_is_canonical(tmp_path):
    from importlib.resources import files

    committed = files("attnlab.papers").joinpath("evidence.json").read_text(encoding="utf-8")
    write(load(), tmp_path / "evidence.json")
    assert (tmp_path / "evidence.json").read_text(encoding="utf-8") == committed


def test_evidence_survives_a_round_trip(tmp_path):
    evidence = {"mixer:b": {"T2": HELD}, "mixer:a": {"T1": FAILING}}
    write(evidence, tmp_path / "e.json")
    assert load(tmp_path / "e.json") == evidence


def test_merge_unites_tests_and_takes_the_new_failures():
    new = {"mixer:a": {"T1": Proof(1, 1, ("tests/c.py::test_d",)), "T2": HELD}}
    merged = merge({"mixer:a": {"T1": HELD}, "mixer:b": {"T1": HELD}}, new)
    assert merged["mixer:a"] == {"T1": Proof(2, 1, ("tests/a.py::test_b", "tests/c.py::test_d")), "T2": HELD}
    assert merged["mixer:b"] == {"T1": HELD}


@pytest.mark.parametrize(
    ("text", "error"), [('{"mixer:a": {"T9": {}}}', UnknownNameError), ('{"mixer:a": {"T1": {"passed": 1}}}', ValueError)]
)
def test_malformed_evidence_is_refused(tmp_path, text, error):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(error, match="mixer:a"):
        load(tmp_path / "e.json")
