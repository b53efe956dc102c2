"""The ledger: every cell, who works on it, and its result, in one SQLite file that processes share and a kill cannot harm."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from attnlab.compare.cells import Cell, Member, canonical
from attnlab.compare.liveness import HEARTBEAT_SECONDS, Owner, this_process
from attnlab.compare.schema import connect

MAX_ATTEMPTS = 3
"""Processes that may die on a cell in one run before it counts as failed."""


@dataclass(frozen=True)
class Claim:
    """A cell that this process, and no other, works on; the token proves it."""

    key: str
    cell: Cell
    token: str


@dataclass(frozen=True)
class Row:
    """A member of a run as the ledger has it; ``result`` is None until its cell is finished."""

    key: str
    member: Member
    status: str
    error: str | None
    result: dict[str, Any] | None
    seconds: float | None


class Ledger:
    """One connection to a ledger; open one in every process and thread.

    Every method is one transaction. SQLite's write-ahead log is synced at each commit, so that what was committed survives
    ``kill -9`` and power loss.

    Args:
        path: the file; it is created, with its folder, where it does not exist.

    Raises:
        ValueError: the file is something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._connection = connect(path)
        self._owner = this_process()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    # Runs

    def open_run(self, facts: Mapping[str, Any]) -> int:
        """Enter a run with what is known before it starts; returns its number."""
        with self._write() as db:
            row = db.execute(
                "INSERT INTO runs (started, state, facts) VALUES (?, 'running', ?)", (time.time(), json.dumps(facts))
            )
            return int(row.lastrowid or 0)

    def close_run(self, run: int, state: str) -> None:
        """Note how a run ended: "finished" or "interrupted"."""
        with self._write() as db:
            db.execute("UPDATE runs SET finished = ?, state = ? WHERE id = ?", (time.time(), state, run))

    def runs(self) -> list[dict[str, Any]]:
        """All runs, oldest first: number, started, finished, state, facts."""
        found = self._connection.execute("SELECT * FROM runs ORDER BY id").fetchall()
        return [{**dict(row), "facts": json.loads(row["facts"])} for row in found]

    def add(self, run: int, members: Sequence[Member]) -> int:
        """Enter members of a run, behind those that it has; cells that are known are not entered twice.

        Returns:
            How many were new to the run.
        """
        added = 0
        with self._write() as db:
            position = db.execute("SELECT count(*) FROM members WHERE run = ?", (run,)).fetchone()[0]
            for member in members:
                key = member.cell.key
                values = (key, member.cell.kind, canonical(member.cell.spec))
                db.execute("INSERT OR IGNORE INTO cells (key, kind, spec) VALUES (?, ?, ?)", values)
                place = (run, key, member.role, member.task, member.mixer, position + added)
                added += db.execute("INSERT OR IGNORE INTO members VALUES (?, ?, ?, ?, ?, ?)", place).rowcount
        return added

    def retry_failed(self, run: int) -> int:
        """Make the failed cells of a run pending again; returns how many there were."""
        with self._write() as db:
            return db.execute(
                "UPDATE cells SET status = 'pending', attempts = 0, error = NULL WHERE status = 'failed'"
                " AND key IN (SELECT key FROM members WHERE run = ?)",
                (run,),
            ).rowcount

    # Work

    def claim(self, run: int, kinds: Sequence[str]) -> Claim | None:
        """Take the first cell of these kinds that nobody works on, or whose worker has died; None if there is none.

        Cells on which processes have died come last. Only deaths in this run can make one fail: a run that is killed again and
        again loses none.
        """
        marks = ", ".join("?" * len(kinds))
        query = (
            "SELECT c.* FROM cells c JOIN members m ON m.key = c.key WHERE m.run = ? AND c.status IN ('pending', 'claimed')"
            f" AND c.kind IN ({marks}) ORDER BY c.attempts, m.position"
        )
        with self._write() as db:
            for row in db.execute(query, (run, *kinds)).fetchall():
                if row["status"] == "claimed" and not self._abandoned(row):
                    continue
                if row["attempts"] >= MAX_ATTEMPTS and (deaths := self._deaths(db, run, row["key"])) >= MAX_ATTEMPTS:
                    self._fail(db, run, row["key"], f"its process died {deaths} times")
                    continue
                return self._take(db, run, row)
        return None

    def _take(self, db: sqlite3.Connection, run: int, row: sqlite3.Row) -> Claim:
        token, owner = uuid.uuid4().hex, self._owner
        db.execute(
            "UPDATE cells SET status = 'claimed', attempts = attempts + 1, token = ?, host = ?, pid = ?, started = ?,"
            " heartbeat = ? WHERE key = ?",
            (token, owner.host, owner.pid, owner.started, time.time(), row["key"]),
        )
        self._log(db, run, row["key"], "claimed" if row["status"] == "pending" else "taken over", f"process {owner.pid}")
        return Claim(row["key"], Cell(row["kind"], json.loads(row["spec"])), token)

    @staticmethod
    def _deaths(db: sqlite3.Connection, run: int, key: str) -> int:
        """Of a cell that nobody works on: claims in this run less those that were given back."""
        query = (
            "SELECT sum(CASE kind WHEN 'released' THEN -1 ELSE 1 END) FROM events WHERE run = ? AND key = ?"
            " AND kind IN ('claimed', 'taken over', 'released')"
        )
        return int(db.execute(query, (run, key)).fetchone()[0] or 0)

    @staticmethod
    def _abandoned(row: sqlite3.Row) -> bool:
        return Owner(row["host"], row["pid"], row["started"]).is_gone(time.time() - row["heartbeat"])

    def beat(self) -> None:
        """Say that this process is alive, to those on other hosts."""
        owner = self._owner
        with self._write() as db:
            db.execute(
                "UPDATE cells SET heartbeat = ? WHERE status = 'claimed' AND host = ? AND pid = ?",
                (time.time(), owner.host, owner.pid),
            )

    def finish(self, run: int, claim: Claim, result: Mapping[str, Any], seconds: float, weights: bytes | None = None) -> bool:
        """Commit a result; False if the claim was lost to another process meanwhile, whose result counts."""
        with self._write() as db:
            if not self._settle(db, claim, "finished", None):
                self._log(db, run, claim.key, "lost", "the claim had been taken over")
                return False
            values = (claim.key, time.time(), seconds, json.dumps(result, allow_nan=False))
            db.execute("INSERT INTO results VALUES (?, ?, ?, ?)", values)
            if weights is not None:
                db.execute("INSERT INTO weights VALUES (?, ?)", (claim.key, weights))
            self._log(db, run, claim.key, "finished", f"{seconds:.3f} s")
            return True

    def fail(self, run: int, claim: Claim, error: str) -> None:
        """Record that a cell raised."""
        with self._write() as db:
            if self._settle(db, claim, "failed", error):
                self._log(db, run, claim.key, "failed", error)

    def release(self, run: int, claim: Claim) -> None:
        """Give a claim back unfinished; the attempt does not count."""
        with self._write() as db:
            if self._settle(db, claim, "pending", None):
                db.execute("UPDATE cells SET attempts = attempts - 1 WHERE key = ?", (claim.key,))
                self._log(db, run, claim.key, "released", "interrupted")

    def crashed(self, run: int, claim: Claim, what: str) -> None:
        """Give a claim back whose process died; the attempt counts."""
        with self._write() as db:
            if self._settle(db, claim, "pending", None):
                self._log(db, run, claim.key, "crashed", what)

    @staticmethod
    def _settle(db: sqlite3.Connection, claim: Claim, status: str, error: str | None) -> bool:
        row = db.execute(
            "UPDATE cells SET status = ?, error = ?, token = NULL WHERE key = ? AND status = 'claimed' AND token = ?",
            (status, error, claim.key, claim.token),
        )
        return row.rowcount == 1

    def _fail(self, db: sqlite3.Connection, run: int, key: str, error: str) -> None:
        db.execute("UPDATE cells SET status = 'failed', error = ?, token = NULL WHERE key = ?", (error, key))
        self._log(db, run, key, "failed", error)

    @staticmethod
    def _log(db: sqlite3.Connection, run: int, key: str | None, kind: str, detail: str) -> None:
        values = (time.time(), run, key, kind, detail)
        db.execute("INSERT INTO events (time, run, key, kind, detail) VALUES (?, ?, ?, ?, ?)", values)

    # What is there

    def rows(self, run: int) -> list[Row]:
        """The members of a run in order, with their results."""
        query = (
            "SELECT c.*, m.role, m.task, m.mixer, r.payload, r.seconds FROM members m JOIN cells c ON c.key = m.key"
            " LEFT JOIN results r ON r.key = c.key WHERE m.run = ? ORDER BY m.position"
        )
        return [
            Row(
                row["key"],
                Member(row["role"], row["task"], row["mixer"], Cell(row["kind"], json.loads(row["spec"]))),
                row["status"],
                row["error"],
                None if row["payload"] is None else json.loads(row["payload"]),
                row["seconds"],
            )
            for row in self._connection.execute(query, (run,)).fetchall()
        ]

    def weights(self, key: str) -> bytes:
        """The parameters that a training cell ended with, as safetensors; KeyError if there are none."""
        row = self._connection.execute("SELECT data FROM weights WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise KeyError(f"the ledger has no weights of cell {key}")
        return bytes(row["data"])

    def events(self, run: int | None = None) -> list[dict[str, Any]]:
        """What happened, oldest first: time, run, key, kind, detail; of one run or of all."""
        where, values = ("", ()) if run is None else (" WHERE run = ?", (run,))
        return [dict(row) for row in self._connection.execute(f"SELECT * FROM events{where} ORDER BY id", values).fetchall()]


class Heartbeat:
    """A thread that beats for this process while the block runs, over a connection of its own."""

    def __init__(self, path: str | os.PathLike[str], every: float = HEARTBEAT_SECONDS) -> None:
        self._path, self._every, self._stop = path, every, threading.Event()
        self._thread = threading.Thread(target=self._run, name="attnlab-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with Ledger(self._path) as ledger:
            while not self._stop.wait(self._every):
                ledger.beat()
