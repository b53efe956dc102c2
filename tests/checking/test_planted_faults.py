"""The checks themselves: right mixers pass them all, and each finds the fault that is planted for it."""

from __future__ import annotations

import re

import pytest

import attnlab
from attnlab.checking import CHECKS
from checking import faults, faults_of_form, faults_of_registered  # noqa: F401  (planting happens when they are imported)
from checking.planting import FAULTS, Fault
from checking.toys import ToyAttention, ToyRecurrence

OUTSIDE_THE_SUITE = ("builds",)  # what the runner itself finds


@pytest.mark.parametrize("mixer", [ToyAttention, ToyRecurrence])
def test_a_right_mixer_passes_everything(mixer: type[attnlab.Mixer]) -> None:
    report = attnlab.check(mixer)
    assert report.passed, str(report)
    assert len(report.records) > 40


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.check}-{fault.mixer.__name__}")
def test_a_fault_is_found_by_its_own_check(fault: Fault) -> None:
    only = None if fault.check in OUTSIDE_THE_SUITE else fault.check
    records = {record.check: record for record in attnlab.check(fault.mixer, only=only).records}
    assert records[fault.check].status == "failed", records[fault.check]
    assert re.search(fault.says, records[fault.check].detail), records[fault.check].detail


def test_every_check_has_a_planted_fault() -> None:
    assert set(CHECKS) == {fault.check for fault in FAULTS} - set(OUTSIDE_THE_SUITE)
