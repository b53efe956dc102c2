"""The tables of a ledger, and how a connection to it is opened."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

VERSION = 1

TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, started REAL NOT NULL, finished REAL, state TEXT NOT NULL, facts TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS cells (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, spec TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'claimed', 'finished', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0, token TEXT, host TEXT, pid INTEGER, started INTEGER, heartbeat REAL, error TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS members (
    run INTEGER NOT NULL REFERENCES runs(id), key TEXT NOT NULL REFERENCES cells(key), role TEXT NOT NULL,
    task TEXT NOT NULL, mixer TEXT NOT NULL, position INTEGER NOT NULL, PRIMARY KEY (run, key, role, task, mixer)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS results (
    key TEXT PRIMARY KEY REFERENCES cells(key), finished REAL NOT NULL, seconds REAL NOT NULL, payload TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS weights (key TEXT PRIMARY KEY REFERENCES results(key), data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, run INTEGER NOT NULL REFERENCES runs(id),
    key TEXT, kind TEXT NOT NULL, detail TEXT NOT NULL
);
"""


def connect(path: str | os.PathLike[str]) -> sqlite3.Connection:
    """Open or create a ledger.

    Raises:
        ValueError: the file is no ledger, or one of another version.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=60.0, isolation_level=None)
    try:
        connection.execute("PRAGMA busy_timeout = 60000")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        _create(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise ValueError(
            f"{os.fspath(path)}: expected a ledger of `attnlab compare`, got a file that SQLite cannot read"
        ) from error
    except ValueError:
        connection.close()
        raise
    connection.row_factory = sqlite3.Row
    return connection


def _create(connection: sqlite3.Connection, path: str | os.PathLike[str]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        others = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if found != VERSION and (found or others):
            raise ValueError(
                f"{os.fspath(path)}: expected a ledger of version {VERSION}, got version {found}; choose another --out"
            )
        for statement in TABLES.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
