"""Measuring claims: each runnable in turn, its verdict, its outcome kept at once."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch

from attnlab.claims.cells import Cells, Reporter, silent
from attnlab.claims.judge import judge
from attnlab.claims.outcomes import Outcome, keep, settled, thresholds
from attnlab.claims.quantity import Measured
from attnlab.claims.spec import Claim, claim, claims
from attnlab.compare.machine import machine_facts

CELLS = Path("runs") / "claims"


def source_version(name: str) -> str:
    """Twelve digits of a hash over the module of ``"module:function"``."""
    source = files("attnlab.claims.measures").joinpath(f"{name.partition(':')[0]}.py")
    return hashlib.sha256(source.read_bytes()).hexdigest()[:12]


def runnable(name: str) -> Callable[..., Measured]:
    """The function ``"module:function"`` of ``attnlab.claims.measures``: cells and a claim's settings to numbers."""
    module, _, function = name.partition(":")
    found: Callable[..., Measured] = getattr(importlib.import_module(f"attnlab.claims.measures.{module}"), function)
    return found


def run_claims(
    ids: Sequence[str] | None = None,
    *,
    cells: str | os.PathLike[str] = CELLS,
    outcomes: str | os.PathLike[str] | None = None,
    threads: int = 1,
    say: Reporter = silent,
) -> list[Outcome]:
    """Measure claims one after the other; each outcome is written as soon as it is there.

    Args:
        ids: which; None: all.
        cells: folder of what is finished: an interrupted call goes on from there, on the same code.
        outcomes: file of the outcomes; None: the package's own.
        threads: of torch meanwhile.
        say: hears of the progress, a line at a time.

    Raises:
        UnknownNameError: for an unknown claim, before anything is measured.
        ValueError: for no thread.
        KeyboardInterrupt: stopped; finished cells and outcomes are kept.
    """
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    chosen = [claim(name) for name in ids] if ids else list(claims().values())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = []
        for number, subject in enumerate(chosen, 1):
            say(f"[{number}/{len(chosen)}] {subject.id}: {subject.budget or subject.not_testable}")
            code = source_version(subject.run) if subject.run else ""
            made.append(measure(subject, Cells(cells, say, code)))
            keep(made[-1], None if outcomes is None else Path(outcomes))
            say(f"[{number}/{len(chosen)}] {subject.id}: {made[-1].outcome}")
        return made
    finally:
        torch.set_num_threads(before)


def measure(subject: Claim, cells: Cells) -> Outcome:
    """One claim's outcome."""
    found = Measured({}) if subject.not_testable else runnable(subject.run)(cells, **subject.settings)
    return Outcome(
        subject.id,
        judge(subject, found.quantities),
        found.quantities,
        found.details,
        settled(subject),
        thresholds(subject),
        machine_facts(measure=False),
        datetime.date.today().isoformat(),
        version("attnlab"),
        round(cells.seconds, 1),
    )
