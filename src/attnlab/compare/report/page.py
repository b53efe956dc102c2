"""The page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attnlab.compare.frame import write_text
from attnlab.compare.summary import Summary


@dataclass(frozen=True)
class Citation:
    """A paper as the report cites it."""

    title: str
    year: int
    arxiv: str | None = None


def write_report(path: Path, summary: Summary, *, citations: Mapping[str, Citation]) -> None:
    """Write the report."""
    write_text(path, "<!doctype html>")
