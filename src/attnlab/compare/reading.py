"""Reading a run back from a ledger."""

from __future__ import annotations

import os
from pathlib import Path

from attnlab.compare.ledger import Ledger, Row
from attnlab.compare.summary import Summary, summarise

LEDGER = "ledger.sqlite"
"""Name of the ledger in the folder of a comparison."""


def read_run(source: str | os.PathLike[str], run: int | None = None) -> tuple[Summary, list[Row]]:
    """A run's summary and its rows.

    Args:
        source: a ledger, or the folder of one.
        run: number of the run; by default the last.

    Raises:
        FileNotFoundError: there is no ledger.
        ValueError: it holds no such run.
    """
    path = Path(source) / LEDGER if Path(source).is_dir() else Path(source)
    if not path.exists():
        raise FileNotFoundError(f"expected a ledger, or a folder with {LEDGER}, got {os.fspath(source)}")
    with Ledger(path) as ledger:
        runs = {entry["id"]: entry for entry in ledger.runs()}
        number = max(runs, default=0) if run is None else run
        if number not in runs:
            raise ValueError(f"run: expected one of {sorted(runs)}, got {number}; the ledger is {path}")
        rows = ledger.rows(number)
    moments = {key: runs[number][key] for key in ("started", "finished", "state")}
    return summarise({**runs[number]["facts"], **moments}, rows), rows
