"""Which proof tiers the tests establish, and that the committed evidence claims no others.

``@pytest.mark.tier("T2", "mixer:delta_net", ...)`` says what a passing test proves; on a parametrised test, give it to
each ``pytest.param(..., marks=...)``. A test that makes several checks may say how many: ``record_property("checks", 24)``.

With ``--write-evidence`` a green run writes ``src/attnlab/papers/evidence.json``. Without, a run fails where the file
claims a tier that the run could have established and did not. A claim is left unjudged when the arguments do not cover all
tests, or when tests that carry it were deselected (``-m 'not slow'``) or lie in an ignored folder.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import pytest

from attnlab.papers.evidence import TIERS, Evidence, Proof, load, merge, write
from plugins.scope import fail_run, is_ignored, is_worker, names_all_tests, report_to_controller, test_function

EVIDENCE = "src/attnlab/papers/evidence.json"
Claim = tuple[str, str]  # ("mixer:delta_net", "T2")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-evidence", action="store_true", help=f"write the proof tiers that this run establishes to {EVIDENCE}"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "tier(level, *things): a pass proves this tier ('T1' to 'T5') of the things ('mixer:agent')"
    )
    config.pluginmanager.register(TierPlugin(config), "attnlab-tiers")


def claims_of(item: pytest.Item) -> list[Claim]:
    """The (thing, tier) pairs of a test's markers; UsageError where a marker is malformed."""
    claims = []
    for mark in item.iter_markers("tier"):
        level, *things = mark.args or ("",)
        if level not in TIERS or not things or not all(isinstance(thing, str) and ":" in thing for thing in things):
            raise pytest.UsageError(
                f"{item.nodeid}: tier marker: expected a level of {tuple(TIERS)} and '<kind>:<name>', got {mark.args}"
            )
        claims += [(thing, level) for thing in things]
    return claims


class TierPlugin:
    """Collects what each marked test proved; in a worker it only tells the controller which claims were deselected."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.path = config.rootpath / EVIDENCE
        self.failed: set[str] = set()
        self.passed: set[str] = set()
        self.claims: dict[str, set[Claim]] = defaultdict(set)  # by test id
        self.checks: Counter[str] = Counter()
        self.deselected: set[Claim] = set()
        self.notes: list[str] = []

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        item.user_properties += [("tier", f"{tier} {thing}") for thing, tier in claims_of(item)]

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected |= {claim for item in items for claim in claims_of(item)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        rows = getattr(node, "workeroutput", {}).get("deselected_claims", "[]")
        self.deselected |= {(thing, tier) for thing, tier in json.loads(rows)}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, value in report.user_properties:
            if key == "tier":
                tier, _, thing = str(value).partition(" ")
                self.claims[report.nodeid].add((thing, tier))
            elif key == "checks" and report.when == "call":
                self.checks[report.nodeid] += int(str(value))
        if report.failed or hasattr(report, "wasxfail"):
            self.failed.add(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if is_worker(self.config):
            report_to_controller(self.config, "deselected_claims", json.dumps(sorted(self.deselected)))
        elif self.config.getoption("write_evidence"):
            self.write(session)
        elif self.path.exists():
            self.judge(session)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for note in self.notes:
            terminalreporter.write_line(f"evidence: {note}")

    def established(self) -> Evidence:
        """What this run proved, as the evidence file keeps it; expected failures count as failures."""
        tests: dict[Claim, list[str]] = defaultdict(list)
        for nodeid, claims in self.claims.items():
            for claim in claims:
                tests[claim].append(nodeid)
        found: dict[str, dict[str, Proof]] = defaultdict(dict)
        for (thing, tier), nodeids in tests.items():
            good = [nodeid for nodeid in nodeids if nodeid in self.passed - self.failed]
            bad = [nodeid for nodeid in nodeids if nodeid in self.failed]
            if good or bad:
                passed = sum(self.checks[nodeid] or 1 for nodeid in good)
                functions = sorted({test_function(nodeid) for nodeid in good + bad})
                found[thing][tier] = Proof(passed, len(bad), tuple(functions))
        return found

    def judged(self, thing: str, tier: str, tests: tuple[str, ...]) -> bool:
        """Whether this run had to establish a claim that the evidence bases on ``tests``."""
        if not names_all_tests(self.config) or (thing, tier) in self.deselected:
            return False
        return not any(is_ignored(self.config, test) for test in tests)

    def judge(self, session: pytest.Session) -> None:
        """Fail the run where the committed evidence claims more than it established."""
        claimed, found = load(self.path), self.established()
        stale = [
            f"{tier} of {thing}, by {', '.join(proof.tests)}"
            for thing, tiers in claimed.items()
            for tier, proof in tiers.items()
            if proof.holds
            and self.judged(thing, tier, proof.tests)
            and not (tier in found.get(thing, {}) and found[thing][tier].holds)
        ]
        if stale:
            listed = "\n".join(f"  {line}" for line in stale)
            fix = "Mend the tests, or run pytest with --write-evidence and commit the file."
            fail_run(session, self.path, f"The evidence is out of date: no passing test of this run establishes\n{listed}\n{fix}")
        unclaimed = sum(
            proof.holds and tier not in claimed.get(thing, {}) for thing, tiers in found.items() for tier, proof in tiers.items()
        )
        if unclaimed:
            self.notes.append(f"{unclaimed} tiers established here are not in {EVIDENCE}; --write-evidence writes them")

    def write(self, session: pytest.Session) -> None:
        """Replace what this run could judge, keep what it could not, add what it found."""
        if session.exitstatus != pytest.ExitCode.OK or session.testsfailed:
            self.notes.append(f"not written to {EVIDENCE}: the run failed")
            return
        old = load(self.path) if self.path.exists() else {}
        kept = {
            thing: {tier: proof for tier, proof in tiers.items() if not self.judged(thing, tier, proof.tests)}
            for thing, tiers in old.items()
        }
        found = self.established()
        write(merge(kept, found), self.path)
        self.notes.append(f"{sum(map(len, found.values()))} tiers of {len(found)} things written to {EVIDENCE}")
