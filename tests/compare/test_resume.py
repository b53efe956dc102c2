"""A comparison that is killed goes on where it was: nothing finished runs twice, nothing is lost."""

from __future__ import annotations

import collections
import functools
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from attnlab.compare import compare
from attnlab.compare import run as run_module
from attnlab.compare.ledger import Ledger
from attnlab.compare.run import LEDGER, REPORT

PROGRAM = """
import sys, torch
from attnlab.compare import compare
torch.set_num_threads(1)
if __name__ == "__main__":
    found = compare("smoke", sys.argv[1], workers=int(sys.argv[2]), timing=False)
    if not found.ok:
        sys.exit(f"failures: {found.summary.failures}, ties: {found.summary.ties}")
"""


def start(folder, workers):
    script = folder / "program.py"
    script.write_text(PROGRAM)
    environment = {**os.environ, "GOMP_SPINCOUNT": "20000"}
    return subprocess.Popen([sys.executable, str(script), str(folder), str(workers)], env=environment, start_new_session=True)


def finished(folder):
    if not (folder / LEDGER).exists():
        return set()
    with Ledger(folder / LEDGER) as ledger:
        return {event["key"] for event in ledger.events() if event["kind"] == "finished"}


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def descendants_of(group):
    """Processes of a process group that are still running."""
    found = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(group)], capture_output=True, text=True, check=False).stdout
    return [line for line in found.splitlines() if line.split()[1][0] != "Z"]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_run_again(tmp_path, workers):
    process = start(tmp_path, workers)
    wait_for(lambda: len(finished(tmp_path)) >= 4)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not descendants_of(process.pid), 20.0)  # workers notice that their parent is gone
    before = finished(tmp_path)
    assert before and not (tmp_path / REPORT).exists(), "it was killed in the middle"

    assert start(tmp_path, workers).wait(timeout=120) == 0
    with Ledger(tmp_path / LEDGER) as ledger:
        rows, events = ledger.rows(2), ledger.events()
    assert len(rows) == 42 and {row.status for row in rows} == {"finished"}
    counts = collections.Counter(event["key"] for event in events if event["kind"] == "finished")
    assert set(counts.values()) == {1}, "no cell was finished twice"
    assert before <= set(counts), "nothing finished was lost"
    again = {event["key"] for event in events if event["run"] == 2 and event["kind"] in ("claimed", "taken over")}
    assert not again & before, "nothing finished was started again"
    assert "stdlib_text" in (tmp_path / REPORT).read_text(encoding="utf-8")


def everything(folder):
    """What a ledger holds of its last run, but for times and places: members, states, results, parameters."""
    with Ledger(folder / LEDGER) as ledger:
        rows = ledger.rows(ledger.runs()[-1]["id"])
        weights = {row.key: ledger.weights(row.key) for row in rows if row.member.cell.kind == "train"}
    found = {}
    for row in rows:
        result = {name: value for name, value in row.result.items() if name not in ("seconds", "cpu_seconds")}
        result["curve"] = [point[:-1] for point in result.get("curve", ())]
        place = (row.member.role, row.member.task, row.member.mixer, row.key)
        found[place] = (row.status, row.error, result, weights.get(row.key))
    return found


def entered(folder, run, kinds=None):
    """Whether this run is in the ledger, and with ``kinds`` whether it has such events."""
    if not (folder / LEDGER).exists():
        return False
    with Ledger(folder / LEDGER) as ledger:
        return len(ledger.runs()) >= run if kinds is None else any(event["kind"] in kinds for event in ledger.events(run))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder, 0).wait(timeout=240) == 0
    return everything(folder)


@pytest.mark.parametrize(
    ("workers", "kills"),
    [(0, 3), pytest.param(0, 20, marks=pytest.mark.slow), pytest.param(2, 20, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_the_ledger_ends_the_same(tmp_path, undisturbed, workers, kills):
    moments = random.Random(kills)
    for run in range(1, kills + 1):
        process = start(tmp_path, workers)
        wait_for(lambda run=run: entered(tmp_path, run), 120.0)
        if moments.random() < 0.7:  # else before any work, while workers start
            begun = functools.partial(entered, tmp_path, run, ("claimed", "taken over"))
            wait_for(lambda begun=begun, process=process: begun() or process.poll() is not None, 120.0)
        time.sleep(moments.uniform(0.0, 3.0 if workers else 0.5))
        process.kill()
        process.wait()
        wait_for(lambda process=process: not descendants_of(process.pid), 120.0)  # those that were just being started too
    assert start(tmp_path, workers).wait(timeout=240) == 0
    assert everything(tmp_path) == undisturbed
    with Ledger(tmp_path / LEDGER) as ledger:
        counts = collections.Counter(event["key"] for event in ledger.events() if event["kind"] == "finished")
    assert set(counts.values()) == {1}, "no cell was finished twice"


def test_workers_that_cannot_start_end_the_run(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(PROGRAM.replace('if __name__ == "__main__":', "if True:"))
    environment = {**os.environ, "GOMP_SPINCOUNT": "20000"}
    command = [sys.executable, str(script), str(tmp_path), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "died in a row without finishing a cell" in done.stderr and "if __name__ == '__main__'" in done.stderr


def test_two_runs_share_a_ledger(tmp_path):
    processes = [start(tmp_path, 0) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    with Ledger(tmp_path / LEDGER) as ledger:
        counts = collections.Counter(event["kind"] for event in ledger.events())
    assert counts == {"claimed": 42, "finished": 42}


def test_a_run_reports_itself_when_another_has_just_begun(tmp_path, monkeypatch):
    execute = run_module._execute

    def and_another_begins(ledger, *rest):
        execute(ledger, *rest)
        ledger.open_run(ledger.runs()[-1]["facts"])  # in another process: it has no cells yet

    monkeypatch.setattr(run_module, "_execute", and_another_begins)
    threads = torch.get_num_threads()
    found = compare("smoke", tmp_path, mixers=["softmax"], tasks=["recall"], workers=0, timing=False)
    torch.set_num_threads(threads)
    assert found.ok
    assert found.rows
