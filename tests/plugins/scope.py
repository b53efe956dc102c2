"""What a test run covers, and how a plugin makes it fail: shared by the tier and skip plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def is_worker(config: pytest.Config) -> bool:
    """True in a worker process of pytest-xdist, whose findings go to the controller."""
    return hasattr(config, "workerinput")


def report_to_controller(config: pytest.Config, key: str, value: Any) -> None:
    """In a worker: hand ``value`` (plain data) to the controller, which gets it in ``pytest_testnodedown``."""
    config.workeroutput[key] = value  # type: ignore[attr-defined]


def test_function(nodeid: str) -> str:
    """A test's id without its parameters."""
    return nodeid.partition("[")[0]


test_function.__test__ = False  # type: ignore[attr-defined]


def names_all_tests(config: pytest.Config) -> bool:
    """True when the arguments cover all of ``testpaths`` and no option drops files unseen (``--ignore`` is `is_ignored`'s)."""
    if any(config.getoption(name, default=None) for name in ("lf", "ignore_glob", "collectonly")):
        return False
    given = [(config.invocation_params.dir / str(arg)).resolve() for arg in config.args]
    wanted = [(config.rootpath / path).resolve() for path in config.getini("testpaths")]
    return all(any(path.is_relative_to(arg) for arg in given) for path in wanted)


def is_ignored(config: pytest.Config, nodeid: str) -> bool:
    """True when ``--ignore`` keeps this test's file out of the run."""
    file = (config.rootpath / nodeid.partition("::")[0]).resolve()
    ignored = [(config.invocation_params.dir / path).resolve() for path in config.getoption("ignore", default=None) or []]
    return any(file.is_relative_to(path) for path in ignored)


def fail_run(session: pytest.Session, subject: Path, problem: str) -> None:
    """Count ``problem`` as an error of the run: printed with the errors, in the summary line and in the exit code."""
    name = subject.relative_to(session.config.rootpath).as_posix()
    report = pytest.CollectReport(nodeid=name, outcome="failed", longrepr=problem, result=[])
    session.config.hook.pytest_collectreport(report=report)
    if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
