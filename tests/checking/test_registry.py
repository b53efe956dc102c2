"""Tier T1: every registered mixer keeps the laws of the contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import attnlab
from attnlab.core.catalog import mixers

# mixer: {check: why it fails, and what must happen for it to pass}
EXPECTED_FAILURES: dict[str, dict[str, str]] = {}


def test_every_mixer_can_be_imported() -> None:
    assert mixers.names()
    assert mixers.broken == {}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.tier("T1", f"mixer:{name}")) for name in attnlab.list_mixers()]
)
def test_laws(name: str, record_property: Callable[[str, object], None]) -> None:
    report = attnlab.check(name, expected_failures=EXPECTED_FAILURES.get(name))
    record_property("checks", report.checks_run)
    assert report.passed, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", attnlab.list_mixers())
def test_laws_thoroughly(name: str) -> None:
    report = attnlab.check(name, profile="thorough", expected_failures=EXPECTED_FAILURES.get(name))
    assert report.passed, str(report)


def test_expected_failures_are_of_registered_mixers() -> None:
    assert set(EXPECTED_FAILURES) <= set(mixers.names())
