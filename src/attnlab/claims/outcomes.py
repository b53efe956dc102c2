"""What was measured for each claim, as package data: ``outcomes.json``, which only `attnlab claims run` writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from attnlab.claims.quantity import Quantity
from attnlab.claims.spec import Claim, claims
from attnlab.compare.cells import canonical


@dataclass(frozen=True)
class Outcome:
    """The verdict on a claim with all that it rests on.

    Args:
        claim: its id.
        outcome: the verdict.
        quantities: the measured numbers by name.
        details: what else was measured, as JSON holds it: per seed, rate, length.
        settings: the arguments of the runnable, and its name.
        thresholds: the conditions as text, as they stood.
        machine: processor, cores, threads, versions, commit.
        date: day of the measurement (ISO 8601).
        version: of attnlab.
        seconds: that the cells of the claim took, those kept from an earlier call included.
    """

    claim: str
    outcome: str
    quantities: Mapping[str, Quantity]
    details: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    thresholds: Mapping[str, list[str]] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""
    version: str = ""
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """As JSON holds it, with a seal over everything else: an edit by hand breaks it."""
        row = asdict(self) | {"quantities": {name: quantity.record() for name, quantity in self.quantities.items()}}
        return row | {"seal": seal(row)}


def seal(record: Mapping[str, Any]) -> str:
    """Sixteen digits of a hash over a record without its seal."""
    rest = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(canonical(rest).encode()).hexdigest()[:16]


def settled(claim: Claim) -> dict[str, Any]:
    """What an outcome keeps of its claim's settings, as JSON gives it back."""
    kept: dict[str, Any] = json.loads(json.dumps({"run": claim.run, **claim.settings}))
    return kept


def thresholds(claim: Claim) -> dict[str, list[str]]:
    """The conditions of a claim as text."""
    return {"reproduced": [c.text for c in claim.reproduced], "partly": [c.text for c in claim.partly]}


def is_stale(claim: Claim, outcome: Outcome) -> bool:
    """Whether settings or thresholds are others now than when the outcome was written."""
    return outcome.settings != settled(claim) or outcome.thresholds != thresholds(claim)


def package_file() -> Path:
    """The package's own ``outcomes.json``."""
    with as_file(files("attnlab.claims").joinpath("outcomes.json")) as path:
        return path


def outcomes(path: Path | None = None) -> dict[str, Outcome]:
    """The outcomes by claim, of a file or of the package; none where there is no file.

    Raises:
        ValueError: the file holds something that `attnlab claims run` did not write.
    """
    source = package_file() if path is None else path
    if not source.exists():
        return {}
    return {name: _outcome(name, row) for name, row in json.loads(source.read_text(encoding="utf-8")).items()}


def _outcome(name: str, row: Mapping[str, Any]) -> Outcome:
    if row.get("seal") != seal(row) or row.get("claim") != name:
        raise ValueError(f"outcome of {name!r}: expected what `attnlab claims run` wrote, got a record that was edited")
    values = {key: value for key, value in row.items() if key != "seal"}
    return Outcome(**{**values, "quantities": {key: Quantity(**value) for key, value in row["quantities"].items()}})


def keep(outcome: Outcome, path: Path | None = None) -> None:
    """Put an outcome into a file, in place of an earlier one of the same claim; the file is replaced whole.

    Outcomes whose claims are no more, or are other ones by now, are left out.
    """
    target = package_file() if path is None else path
    live = {name: old for name, old in outcomes(target).items() if name in claims() and not is_stale(claims()[name], old)}
    known = {**live, outcome.claim: outcome}
    text = json.dumps({name: known[name].record() for name in sorted(known)}, indent=1, sort_keys=True, ensure_ascii=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(target)
