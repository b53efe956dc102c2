"""The ledger: claims are exclusive, abandoned ones are taken over, and what was finished stays."""

from __future__ import annotations

import collections
import multiprocessing
import sqlite3
import subprocess
import sys
import time

import pytest

from attnlab.compare.cells import Cell, Member
from attnlab.compare.ledger import MAX_ATTEMPTS, Heartbeat, Ledger
from attnlab.compare.liveness import STALE_SECONDS, Owner, is_running, this_host, this_process


def cells(count):
    train = [Cell("train", {"mixer": {"name": "softmax"}, "number": number}) for number in range(count)]
    return [Member("sweep", "recall", "softmax", cell) for cell in train]


def drain(path, run, number, queue):
    """Claim and finish until nothing is left; runs in a process of its own."""
    done = []
    with Ledger(path) as ledger:
        while (claim := ledger.claim(run, ["train"])) is not None:
            time.sleep(0.001)
            assert ledger.finish(run, claim, {"by": number}, 0.001)
            done.append(claim.key)
    queue.put(done)


def test_two_processes_share_a_ledger(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        run = ledger.open_run({})
        assert ledger.add(run, cells(60)) == 60
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=drain, args=(path, run, number, queue)) for number in range(2)]
    for worker in workers:
        worker.start()
    done = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(done[0] + done[1]) == sorted(member.cell.key for member in cells(60))
    with Ledger(path) as ledger:
        assert {row.status for row in ledger.rows(run)} == {"finished"}
        kinds = collections.Counter(event["kind"] for event in ledger.events())
    assert kinds == {"claimed": 60, "finished": 60}
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_cells_are_entered_once_and_claimed_in_order(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        first, second = ledger.open_run({"n": 1}), ledger.open_run({"n": 2})
        assert ledger.add(first, cells(3)) == 3
        assert ledger.add(first, cells(4)) == 1
        assert ledger.add(second, cells(2)) == 2
        claimed = [ledger.claim(first, ["train"]).key for _ in range(3)]
        assert claimed == [member.cell.key for member in cells(3)]
        assert ledger.claim(second, ["train"]) is None, "its cells are claimed by this process, in another run"
        assert ledger.claim(first, ["timing"]) is None
        assert [run["facts"]["n"] for run in ledger.runs()] == [1, 2]


def test_finished_is_never_claimed_again(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        run = ledger.open_run({})
        ledger.add(run, cells(1))
        claim = ledger.claim(run, ["train"])
        assert ledger.finish(run, claim, {"x": 1}, 0.5, weights=b"w")
        again = ledger.open_run({})
        ledger.add(again, cells(1))
        assert ledger.claim(again, ["train"]) is None
        assert ledger.rows(again)[0].result == {"x": 1}
        assert ledger.weights(claim.key) == b"w"
        with pytest.raises(KeyError, match="no weights"):
            ledger.weights("other")


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_claim_of_a_dead_process_is_taken_over(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        run = ledger.open_run({})
        ledger.add(run, cells(1))
        lost = ledger.claim(run, ["train"])
        assert ledger.claim(run, ["train"]) is None, "this process lives"
        ledger._connection.execute("UPDATE cells SET pid = ?", (dead_process(),))
        taken = ledger.claim(run, ["train"])
        assert taken.key == lost.key
        assert not ledger.finish(run, lost, {"x": 0}, 0.1), "the old token is worth nothing"
        assert ledger.finish(run, taken, {"x": 1}, 0.1)
        assert ledger.rows(run)[0].result == {"x": 1}
        assert [event["kind"] for event in ledger.events(run)] == ["claimed", "taken over", "lost", "finished"]


def test_a_cell_that_kills_its_process_ends_as_failed(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        run, dead = ledger.open_run({}), dead_process()
        ledger.add(run, cells(1))
        for _ in range(MAX_ATTEMPTS):
            assert ledger.claim(run, ["train"]) is not None
            ledger._connection.execute("UPDATE cells SET pid = ?", (dead,))
        assert ledger.claim(run, ["train"]) is None
        row = ledger.rows(run)[0]
        assert (row.status, row.error) == ("failed", f"its process died {MAX_ATTEMPTS} times")
        assert ledger.retry_failed(run) == 1
        assert ledger.claim(run, ["train"]) is not None


def test_deaths_in_other_runs_do_not_count_but_put_a_cell_last(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        dead, first = dead_process(), cells(2)[0].cell.key
        for _ in range(2 * MAX_ATTEMPTS):
            run = ledger.open_run({})
            ledger.add(run, cells(1))
            assert ledger.claim(run, ["train"]).key == first
            ledger._connection.execute("UPDATE cells SET pid = ?", (dead,))
        ledger.add(run, cells(2))
        assert [ledger.claim(run, ["train"]).key for _ in range(2)] == [cells(2)[1].cell.key, first]


def test_a_crash_counts_and_a_release_does_not(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        run = ledger.open_run({})
        ledger.add(run, cells(1))
        for _ in range(MAX_ATTEMPTS):
            ledger.release(run, ledger.claim(run, ["train"]))
            ledger.crashed(run, ledger.claim(run, ["train"]), "WorkerCrashedError")
        assert ledger.claim(run, ["train"]) is None
        assert ledger.rows(run)[0].error == f"its process died {MAX_ATTEMPTS} times"


def test_release_gives_the_attempt_back(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        run = ledger.open_run({})
        ledger.add(run, cells(1))
        for _ in range(MAX_ATTEMPTS + 1):
            ledger.release(run, ledger.claim(run, ["train"]))
        claim = ledger.claim(run, ["train"])
        ledger.fail(run, claim, "ValueError: no")
        assert ledger.rows(run)[0].error == "ValueError: no"


def test_processes_are_told_apart():
    me = this_process()
    assert not me.is_gone(1e9)
    assert Owner(me.host, me.pid, me.started + 1).is_gone(0.0), "another process of the same number"
    assert Owner("elsewhere", me.pid, me.started).is_gone(STALE_SECONDS + 1)
    assert not Owner("elsewhere", me.pid, me.started).is_gone(STALE_SECONDS - 1)
    assert is_running(me.pid)
    assert not is_running(dead_process())
    assert this_host() == me.host


def test_heartbeat_beats(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        run = ledger.open_run({})
        ledger.add(run, cells(1))
        ledger.claim(run, ["train"])
        ledger._connection.execute("UPDATE cells SET heartbeat = 0")
        with Heartbeat(ledger.path, every=0.02):
            for _ in range(200):
                if (beat := ledger._connection.execute("SELECT heartbeat FROM cells").fetchone()[0]) > 0:
                    break
                time.sleep(0.01)
        assert beat > 0


def test_other_files_are_refused(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to be read as a header of one" * 4)
    with pytest.raises(ValueError, match="SQLite cannot read"):
        Ledger(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()
    with pytest.raises(ValueError, match="expected a ledger of version"):
        Ledger(other)
