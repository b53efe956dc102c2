"""Data that the user has to fetch: where it is looked for, and what is said when it is not there."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "ATTNLAB_DATA"
"""The environment variable that names the folder of data sets."""


class MissingDataError(FileNotFoundError):
    """Files that a task reads are not on this machine; the message says which, where from, and how to point at them."""


def find_data(task: str, path: str | os.PathLike[str] | None, files: tuple[str, ...], source: str) -> Path:
    """The folder with a task's files.

    Args:
        task: name of the task; without ``path``, it is looked for in the folder that ATTNLAB_DATA names.
        path: the folder, or None.
        files: what must be in it.
        source: where the data are published, for the message.

    Raises:
        MissingDataError: if the folder or one of the files is not there.
    """
    root = os.environ.get(VARIABLE)
    folder = Path(path) if path is not None else Path(root) / task if root else None
    missing = list(files) if folder is None else [name for name in files if not (folder / name).exists()]
    if folder is None or missing:
        where = "no folder was given" if folder is None else f"{folder} does not have {', '.join(missing)}"
        raise MissingDataError(
            f"task {task!r} reads data that attnlab does not fetch ({source}): {where}. "
            f"Give path=FOLDER with {', '.join(files)}, or set {VARIABLE} to the folder that holds {task}/"
        )
    return folder
