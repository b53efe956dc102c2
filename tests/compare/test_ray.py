"""The Ray executor: the same results as in this process, and nothing lost when a worker is killed."""

from __future__ import annotations

import collections
import copy
import importlib
import os
import signal
import threading
import time
from contextlib import suppress

import psutil
import pytest
import torch

from attnlab.compare import MixerChoice, Suite, TaskChoice, compare
from attnlab.compare import run as run_module
from attnlab.compare.executors import choose_executor
from attnlab.compare.ledger import MAX_ATTEMPTS, Ledger
from attnlab.compare.ray_executor import RayExecutor
from attnlab.compare.run import LEDGER
from attnlab.core.errors import MissingPackageError, UnknownNameError

ray = pytest.importorskip("ray")


def suite(steps=8):
    options = {"seq_len": 16, "num_pairs": 2, "vocab_size": 12, "eval_examples": 16}
    budget = {"steps": steps, "batch_size": 8, "parameters": 6000, "depth": 1}
    mixers = (MixerChoice("softmax"), MixerChoice("sigmoid"))
    return Suite("tiny", (TaskChoice("recall", options, budget),), mixers, seeds=2, learning_rates=(0.003, 0.01))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    return compare(suite(), tmp_path_factory.mktemp("here"), executor="here")


def without_times(results):
    """Results of all cells by key, but for what was measured by a clock."""
    found = {}
    for row in results.rows:
        result = copy.deepcopy(row.result)
        for name in ("seconds", "cpu_seconds"):
            result.pop(name, None)
        if "curve" in result:
            result["curve"] = [point[:-1] for point in result["curve"]]
        found[row.key] = (row.member, row.status, result)
    return found


def weights_of(results):
    with Ledger(results.folder / LEDGER) as ledger:
        return {row.key: ledger.weights(row.key) for row in results.rows if row.member.cell.kind == "train"}


def facts_of(results):
    with Ledger(results.folder / LEDGER) as ledger:
        return ledger.runs()[-1]["facts"]


def test_ray_gives_what_this_process_gives(tmp_path, in_process):
    assert not ray.is_initialized()
    found = compare(suite(), tmp_path, executor="ray", workers=2)
    assert not ray.is_initialized(), "what was started is stopped"
    assert found.ok
    assert without_times(found) == without_times(in_process)
    assert weights_of(found) == weights_of(in_process)
    assert {key: facts_of(found)[key] for key in ("executor", "workers")} == {"executor": "ray", "workers": 2}
    assert facts_of(in_process)["executor"] == "here"
    again = compare(suite(), tmp_path, executor="here")
    assert {row.key: row.seconds for row in again.rows} == {row.key: row.seconds for row in found.rows}, "nothing ran again"


@pytest.fixture(scope="module")
def cluster():
    """One instance for several tests; the executor leaves it running."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=128 * 2**20,
    )
    yield
    ray.shutdown()


def ray_workers():
    """Processes that Ray runs tasks of cells in."""
    found = []
    with suppress(psutil.Error):  # processes may end while they are asked
        for process in psutil.Process().children(recursive=True):
            found += [process.pid] if process.name().startswith("ray::work") else []
    return found


def kill_when(condition, stop, killed):
    while not stop.is_set():
        if condition() and (workers := ray_workers()):
            with suppress(ProcessLookupError):
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])
                return
        time.sleep(0.005)


def test_a_killed_worker_loses_nothing(tmp_path, cluster, in_process):
    stop, killed = threading.Event(), []
    killer = threading.Thread(target=kill_when, args=((tmp_path / LEDGER).exists, stop, killed))
    killer.start()
    try:
        found = compare(suite(steps=9), tmp_path, executor="ray", workers=2)
    finally:
        stop.set()
        killer.join()
    assert ray.is_initialized() and killed and found.ok
    with Ledger(tmp_path / LEDGER) as ledger:
        kinds = collections.Counter(event["kind"] for event in ledger.events())
    assert kinds["crashed"] == 1 and kinds["finished"] == len(found.rows) == len(in_process.rows)
    assert kinds["claimed"] == kinds["finished"] + 1


def test_a_cell_that_kills_its_worker_fails_in_the_end(tmp_path, cluster):
    stop = threading.Event()

    def kill_all():
        while not stop.wait(0.002):
            with suppress(ProcessLookupError):
                for worker in ray_workers():
                    os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill_all)
    killer.start()
    chosen = Suite("one", suite().tasks, suite().mixers[:1], seeds=1, learning_rates=(0.003,), control=False)
    try:
        found = compare(chosen, tmp_path, executor="ray", workers=1)
    finally:
        stop.set()
        killer.join()
    assert not found.ok and {row.error for row in found.rows} == {f"its process died {MAX_ATTEMPTS} times"}
    assert compare(chosen, tmp_path, executor="ray", workers=1).ok, "the same call tries again"


def test_cells_are_given_back_when_stopped(tmp_path, cluster, monkeypatch):
    class Stopped(run_module.Silent):
        def update(self, rows):
            if any(row.status == "finished" for row in rows):
                raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "Silent", Stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(suite(), tmp_path, executor="ray", workers=2)
    with Ledger(tmp_path / LEDGER) as ledger:
        assert {row.status for row in ledger.rows(1)} == {"finished", "pending"}
        assert ledger.runs()[0]["state"] == "interrupted"
    monkeypatch.undo()
    assert compare(suite(), tmp_path, executor="ray", workers=2).ok


def test_what_a_cell_raises_is_told(tmp_path, cluster):
    none = {**suite().tasks[0].budget, "batch_size": 0}
    broken = Suite("broken", (TaskChoice("recall", suite().tasks[0].options, none),), suite().mixers[:1], control=False)
    found = compare(broken, tmp_path, executor="ray", workers=2)
    failed = [row.error for row in found.rows if row.status == "failed"]
    assert failed and all(error.startswith("ValueError: steps, batch_size: expected positive") for error in failed)


def test_wrong_choices_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="unknown executor 'rya'; did you mean 'ray'"):
        compare(suite(), tmp_path, executor="rya")
    with pytest.raises(UnknownNameError, match="unknown executor 'dask'; known: here, pool, ray"):
        choose_executor("dask", 1)
    with pytest.raises(ValueError, match="workers: expected at least 1 for the executor 'ray', got 0"):
        choose_executor("ray", 0)
    with pytest.raises(ValueError, match="address: expected executor='ray' beside it, got None"):
        choose_executor(None, 1, "auto")
    chosen = [choose_executor(None, 0), choose_executor(None, 2), choose_executor("here", 2), choose_executor("pool", 1)]
    assert [executor.name for executor in chosen] == ["here", "pool", "here", "pool"]

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        MissingPackageError, match=r'the Ray executor needs ray, which is not installed: pip install "attnlab\[ray\]"'
    ):
        choose_executor("ray", 2)
    assert not (tmp_path / LEDGER).exists()


def test_an_address_that_nothing_answers_at_is_refused(monkeypatch):
    executor = RayExecutor(1, "127.0.0.1:1")
    monkeypatch.setattr(executor._ray, "is_initialized", lambda: False)

    def init(**_):
        raise ConnectionError("no Ray there")

    monkeypatch.setattr(executor._ray, "init", init)
    with (
        pytest.raises(ValueError, match=r"address: expected that of a running Ray cluster, got '127\.0\.0\.1:1'"),
        executor._connection(),
    ):
        pass
