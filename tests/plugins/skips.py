"""The ledger of skips: a test that skips or is expected to fail has an entry in ``tests/skips.toml``, or the run fails.

An entry gives ``test`` (the id of a case, of a test function, or of a file), ``reason`` (why it cannot pass) and ``until``
(what must happen for the entry to go). A run over all tests also fails on an entry that names no test of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any

import pytest

from plugins.scope import fail_run, is_ignored, is_worker, names_all_tests, report_to_controller, test_function

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LEDGER = "tests/skips.toml"


@dataclass(frozen=True)
class Entry:
    """A skip that is accounted for."""

    test: str
    reason: str
    until: str

    def names(self, nodeid: str) -> bool:
        """True when the entry is about this test."""
        return self.test in (nodeid, test_function(nodeid), nodeid.partition("::")[0])


def read_ledger(text: str) -> list[Entry]:
    """The entries of a ledger; ValueError where a key is missing, unknown or empty."""
    wanted = {field.name for field in fields(Entry)}
    entries = []
    for number, row in enumerate(tomllib.loads(text).get("skip", []), 1):
        if set(row) != wanted or not all(isinstance(value, str) and value.strip() for value in row.values()):
            raise ValueError(f"skip {number}: expected the keys {sorted(wanted)}, each a non-empty string; got {row}")
        entries.append(Entry(**row))
    return entries


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipPlugin(config), "attnlab-skips")


class SkipPlugin:
    """Collects what skipped, and holds it against the ledger."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.path = config.rootpath / LEDGER
        self.seen: set[str] = set()
        self.skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seen.add(report.nodeid)
        if report.skipped:
            self.skipped[report.nodeid] = getattr(report, "wasxfail", None) or _reason(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.seen.add(report.nodeid)
        if report.skipped:
            self.skipped[report.nodeid] = _reason(report)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.seen |= {item.nodeid for item in items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        output = getattr(node, "workeroutput", {})
        self.seen |= set(output.get("seen", ()))
        self.skipped |= output.get("skipped", {})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if is_worker(self.config):
            report_to_controller(self.config, "seen", sorted(self.seen))
            report_to_controller(self.config, "skipped", self.skipped)
            return
        if session.exitstatus in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.INTERRUPTED):
            return
        try:
            entries = read_ledger(self.path.read_text(encoding="utf-8")) if self.path.exists() else []
        except ValueError as error:
            fail_run(session, self.path, f"The skip ledger cannot be read: {error}")
            return
        if problems := [*self.unaccounted(entries), *self.dangling(entries)]:
            fail_run(session, self.path, "The skip ledger is out of date:\n" + "\n".join(f"  {line}" for line in problems))

    def unaccounted(self, entries: list[Entry]) -> list[str]:
        """Skips that no entry names."""
        return [
            f"{nodeid} skipped without an entry here: {reason}"
            for nodeid, reason in sorted(self.skipped.items())
            if not any(entry.names(nodeid) for entry in entries)
        ]

    def dangling(self, entries: list[Entry]) -> list[str]:
        """Entries that name no test, in a run that saw all; none in a run that did not."""
        if not names_all_tests(self.config):
            return []
        return [
            f"the entry {entry.test} names no test"
            for entry in entries
            if not is_ignored(self.config, entry.test) and not any(entry.names(nodeid) for nodeid in self.seen)
        ]


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped, as it was written."""
    text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
    return text.removeprefix("Skipped: ")
