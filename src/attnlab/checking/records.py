"""What `attnlab.check` returns: a record a check, and a report of them all."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from attnlab.core.errors import AttnlabError

Status = Literal["passed", "failed", "expected_failure", "skipped"]

_STYLES: dict[Status, str] = {"passed": "green", "failed": "bold red", "expected_failure": "yellow", "skipped": "dim"}


class ConformanceError(AttnlabError, AssertionError):
    """A mixer breaks laws of the contract; the message lists which."""


@dataclass(frozen=True)
class Record:
    """The outcome of one check.

    Args:
        check: its name.
        promise: the promise that it counts for.
        status: "passed", "failed", "expected_failure" (it failed, and the caller had said so), or "skipped".
        detail: what was looked at, what is broken, or why it was skipped.
        seconds: how long it took.
    """

    check: str
    promise: str
    status: Status
    detail: str
    seconds: float

    @property
    def ran(self) -> bool:
        """Whether it looked at anything."""
        return self.status != "skipped"


@dataclass(frozen=True)
class Report:
    """The outcome of `attnlab.check`.

    Args:
        target: name of what was checked.
        profile: how much was drawn.
        seed: of the draws.
        records: one a check, in the order of the laws.
    """

    target: str
    profile: str
    seed: int
    records: tuple[Record, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed, but for those that were expected to."""
        return not self.failures

    @property
    def failures(self) -> tuple[Record, ...]:
        """The records that failed."""
        return tuple(record for record in self.records if record.status == "failed")

    @property
    def seconds(self) -> float:
        """Time of all checks together."""
        return sum(record.seconds for record in self.records)

    @property
    def checks_run(self) -> int:
        """How many checks looked at something."""
        return sum(record.ran for record in self.records)

    def counts(self) -> dict[str, int]:
        """For each promise, how many checks of it ran."""
        return dict(Counter(record.promise for record in self.records if record.ran))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {
            "target": self.target,
            "profile": self.profile,
            "seed": self.seed,
            "passed": self.passed,
            "seconds": self.seconds,
            "counts": self.counts(),
            "records": [asdict(record) for record in self.records],
        }

    def raise_if_failed(self) -> None:
        """Raise `ConformanceError` with the failures, if there are any."""
        if not self.passed:
            raise ConformanceError(str(self))

    def summary(self) -> str:
        """One line: the target and how many checks had which outcome."""
        outcomes = Counter(record.status for record in self.records)
        said = ", ".join(f"{outcomes[status]} {status.replace('_', ' ')}" for status in _STYLES if outcomes[status])
        return f"{self.target}: {said} in {self.seconds:.1f} s"

    def __str__(self) -> str:
        broken = [f"  {record.check} ({record.promise}): {record.detail}" for record in self.failures]
        return "\n".join([self.summary(), *broken])

    def __rich__(self) -> Table:
        table = Table(title=self.summary(), title_justify="left", expand=False)
        for column in ("promise", "check", "status"):
            table.add_column(column, no_wrap=True)
        table.add_column("seconds", justify="right")
        table.add_column("detail", overflow="fold")
        for record in self.records:
            status = Text(record.status.replace("_", " "), style=_STYLES[record.status])
            table.add_row(record.promise, record.check, status, f"{record.seconds:.2f}", Text(record.detail))
        return table
