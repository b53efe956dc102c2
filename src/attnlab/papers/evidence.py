"""What the tests have proven, as package data: ``evidence.json``, written by a test run with ``--write-evidence``.

The file maps ``"<kind>:<name>"`` (``"mixer:delta_net"``) to tiers, and each tier to the outcome of its tests::

    {"mixer:delta_net": {"T2": {"passed": 3, "failed": 0, "tests": ["tests/mixers/test_delta_net.py::test_reference"]}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

from attnlab.core.errors import UnknownNameError

TIERS: Mapping[str, str] = {
    "T1": "contract: the nine laws, on random shapes, dtypes, masks and splits",
    "T2": "definition: equals the reference, values and gradients, in float64",
    "T3": "authors: equals the authors' code on recorded vectors, values and gradients",
    "T4": "models: named variants have exactly the published parameter count",
    "T5": "learning: trains, and solves the smallest task that the paper says it should",
}


@dataclass(frozen=True)
class Proof:
    """The outcome of the tests of one tier for one registered thing.

    Attributes:
        passed: cases that passed.
        failed: cases that failed as expected (``xfail``); one is enough for the tier not to hold.
        tests: ids of the test functions, without parameters, sorted.
    """

    passed: int
    failed: int
    tests: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """True when at least one case passed and none failed."""
        return self.passed > 0 and self.failed == 0


Evidence = Mapping[str, Mapping[str, Proof]]


def load(path: Path | None = None) -> dict[str, dict[str, Proof]]:
    """Read an evidence file: ``path``, or the package's own.

    Raises:
        ValueError: the file is not in the form that `write` gives it; says where.
        UnknownNameError: it names a tier that is not in `TIERS`.
    """
    source = files("attnlab.papers").joinpath("evidence.json") if path is None else path
    raw = json.loads(source.read_text(encoding="utf-8"))
    return {name: {tier: _proof(f"{name} {tier}", tier, row) for tier, row in tiers.items()} for name, tiers in raw.items()}


def merge(old: Evidence, new: Evidence) -> dict[str, dict[str, Proof]]:
    """Both together. Where both have a tier of a thing: the tests of both, the larger count of passes, the new failures."""
    merged = {name: dict(tiers) for name, tiers in old.items()}
    for name, tiers in new.items():
        held = merged.setdefault(name, {})
        for tier, proof in tiers.items():
            if (before := held.get(tier)) is not None:
                tests = tuple(sorted({*before.tests, *proof.tests}))
                proof = Proof(max(before.passed, proof.passed), proof.failed, tests)
            held[tier] = proof
    return merged


def write(evidence: Evidence, path: Path) -> None:
    """Write ``evidence`` to ``path``, sorted, so that two files differ only where their facts do."""
    rows = {name: {tier: asdict(proof) for tier, proof in tiers.items()} for name, tiers in evidence.items() if tiers}
    path.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _proof(where: str, tier: str, row: Mapping[str, object]) -> Proof:
    if tier not in TIERS:
        raise UnknownNameError(f"evidence of {where}: expected a tier of {tuple(TIERS)}, got {tier!r}")
    match row:
        case {"passed": int(passed), "failed": int(failed), "tests": [*tests]} if len(row) == 3:
            return Proof(passed, failed, tuple(str(test) for test in tests))
    raise ValueError(f"evidence of {where}: expected the keys passed, failed (counts) and tests (a list), got {dict(row)}")
