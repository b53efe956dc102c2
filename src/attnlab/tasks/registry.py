"""The registry of tasks and its three verbs."""

from __future__ import annotations

from typing import Any

from attnlab.core.info import Info
from attnlab.core.registry import Registry
from attnlab.tasks.contract import Task

tasks: Registry[Task] = Registry("task", "attnlab.tasks")


def create_task(name: str, **options: Any) -> Task:
    """Build a registered task: ``create_task("recall", seq_len=128, num_pairs=16)``.

    Raises:
        UnknownNameError: for an unknown task or option; the nearest ones are named.
    """
    return tasks.create(name, **options)


def list_tasks(pattern: str = "*") -> list[str]:
    """Names of tasks that match a shell pattern."""
    return tasks.names(pattern)


def task_info(name: str) -> Info:
    """Summary and options of a task."""
    return tasks.info(name)
