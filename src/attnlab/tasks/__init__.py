"""Tasks on which mechanisms are compared: recall, language modelling, classification; `list_tasks` names them."""

from __future__ import annotations

from attnlab.tasks.contract import IGNORE, Batch, Budget, Task
from attnlab.tasks.reference import reference_model
from attnlab.tasks.registry import create_task, list_tasks, task_info, tasks

__all__ = ["IGNORE", "Batch", "Budget", "Task", "create_task", "list_tasks", "reference_model", "task_info", "tasks"]
