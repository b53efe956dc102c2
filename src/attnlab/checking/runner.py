"""`attnlab.check`: choose the checks by the promises, run each on a seeded bench, account for all of them."""

from __future__ import annotations

import fnmatch
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from attnlab.checking import (
    bad_input,
    batch,
    causality,
    combining,
    construction,
    cost,
    empty_rows,
    jumps,
    matrix,
    packed,
    padding,
    pairs,
    precision,
    randomness,
    refusal,
    shapes,
    state,
    streaming,
    supports,
)
from attnlab.checking.bench import PROFILES, Bench, Profile
from attnlab.checking.draw import Draw
from attnlab.checking.outcome import NotApplicable, Violation
from attnlab.checking.records import Record, Report, Status
from attnlab.checking.subject import Subject, Target
from attnlab.checking.suite import CHECKS, PROMISES, Check
from attnlab.core.errors import UnknownNameError, nearest

MODULES = (
    construction,
    shapes,
    matrix,
    pairs,
    padding,
    empty_rows,
    causality,
    combining,
    streaming,
    state,
    batch,
    packed,
    precision,
    refusal,
    supports,
    jumps,
    cost,
    bad_input,
    randomness,
)
"""Where the checks stand; importing them enters them into the suite."""


def check(
    target: Target,
    *,
    profile: str = "default",
    seed: int = 0,
    only: str | Sequence[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Prove a token mixer against the nine laws, as far as its flags promise them.

    attnlab.check(MyMixer).raise_if_failed()

    The mixers are 16 wide with 4 heads and see 7 to 65 tokens: windows, chunks and the like have to be made smaller than that,
    by ``info.example`` or ``options``, for a fault at their edges to show.

    Args:
        target: a registered name, a `Mixer` class, a callable ``(**options) -> Mixer``, or a built mixer, which is copied.
        profile: "default" (seconds) or "thorough" (many more draws).
        seed: of the draws; the same seed draws the same cases.
        only: names of checks to run, shell patterns allowed; by default all that the promises select. A promise of which no
            check ran is a failure, unless ``only`` is given.
        expected_failures: names of checks that are known to fail, each with a reason. One that passes is a failure.
        options: for the constructor; they replace those of ``info.example``.

    Returns:
        One record a check.

    Raises:
        UnknownNameError: for an unknown mixer, profile or check.
        ValueError: for an expected failure without a reason.
        TypeError: for a target that is none of these.
    """
    if profile not in PROFILES:
        raise UnknownNameError(f"profile: expected one of {sorted(PROFILES)}, got {profile!r}{nearest(profile, PROFILES)}")
    expected = _expectations(expected_failures or {})
    wanted = _chosen(only)
    subject = Subject(target, options)
    with _quiet_torch():
        records = _run_all(subject, PROFILES[profile], seed, wanted, expected)
        if only is None and not _unbuilt(records):
            records += _unproven(subject, records)
    records += [
        Record(name, CHECKS[name].promise, "failed", f"was expected to fail ({reason}), but did not run", 0.0)
        for name, reason in expected.items()
        if name in wanted and name not in {record.check for record in records if record.ran}
    ]
    return Report(subject.name, profile, seed, tuple(records))


def _run_all(subject: Subject, profile: Profile, seed: int, wanted: Sequence[str], expected: Mapping[str, str]) -> list[Record]:
    start = time.perf_counter()
    try:
        for form in subject.forms:
            subject.mixer(form)
    except Exception as error:
        return [Record("builds", "contract", "failed", _said(error), time.perf_counter() - start)]
    records = [Record("builds", "contract", "passed", f"causal in {subject.forms}", time.perf_counter() - start)]
    for name in wanted:
        if CHECKS[name].applies(subject.supports):
            records.append(_run(CHECKS[name], subject, profile, seed, expected.get(name)))
    return records


def _run(chosen: Check, subject: Subject, profile: Profile, seed: int, expected: str | None) -> Record:
    bench = Bench(subject, profile, Draw(seed + zlib.crc32(chosen.name.encode())))
    torch.manual_seed(seed)
    start = time.perf_counter()
    status: Status
    try:
        status, detail = "passed", chosen.run(bench)
    except NotApplicable as error:
        status, detail = "skipped", str(error)
    except Exception as error:
        status, detail = "failed", _said(error)
    seconds = time.perf_counter() - start
    if expected is not None and status == "failed":
        status, detail = "expected_failure", f"{expected} ({detail})"
    elif expected is not None and status == "passed":
        status, detail = "failed", f"unexpectedly passes; was expected to fail: {expected}"
    return Record(chosen.name, chosen.promise, status, detail, seconds)


def _said(error: Exception) -> str:
    """What to tell: a violation speaks for itself, any other error is told with its last place outside of installed packages."""
    if isinstance(error, Violation):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:300]} (at {Path(own[-1].filename).name}:{own[-1].lineno})"


def _unproven(subject: Subject, records: Sequence[Record]) -> list[Record]:
    """A failure for each promise that is made, has a meaning for a form that there is, and of which no check ran."""
    proven = {record.promise for record in records if record.ran}
    if subject.factory is None and subject.supports.tokens_option is not None:
        proven |= {"cost", "grid"}  # it cannot be built for other numbers of tokens
    return [
        Record(f"proves_{name}", name, "failed", f"{name} is promised, but no check of it ran", 0.0)
        for name, promise in PROMISES.items()
        if promise.made(subject.supports) and promise.form in (None, *subject.forms) and name not in proven
    ]


def _unbuilt(records: Sequence[Record]) -> bool:
    return records[0].status == "failed"


def _expectations(expected: Mapping[str, str]) -> dict[str, str]:
    for name, reason in expected.items():
        if name not in CHECKS:
            raise UnknownNameError(f"expected_failures: unknown check {name!r}{nearest(name, CHECKS)}")
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"expected_failures: expected a reason for {name!r}, got {reason!r}")
    return dict(expected)


def _chosen(only: str | Sequence[str] | None) -> list[str]:
    by_law = sorted(CHECKS, key=lambda name: CHECKS[name].law)
    if only is None:
        return by_law
    patterns = [only] if isinstance(only, str) else list(only)
    for pattern in patterns:
        if not fnmatch.filter(CHECKS, pattern):
            raise UnknownNameError(f"only: no check is called {pattern!r}{nearest(pattern, CHECKS)}")
    return [name for name in by_law if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """One thread, and the caller's global random state left as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
