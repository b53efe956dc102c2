"""Finished work, a file each: what a killed run had measured is not measured again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from attnlab.compare.cells import canonical, code_version

Reporter: TypeAlias = Callable[[str], None]
"""What hears of the work, a line at a time."""


def silent(line: str) -> None:
    """Tell nobody."""


class Cells:
    """Results by what determines them: name, settings, and the code of the library and of the function that measures.

    Each is written at once and whole, under a name of its own, so that neither a kill nor a second process can harm it.

    Args:
        folder: where they lie; it is made with the first result.
        say: hears of every cell.
        version: of the code that measures, beside the library's own.
    """

    def __init__(self, folder: str | os.PathLike[str], say: Reporter = silent, version: str = "") -> None:
        self.folder, self.say, self.version = Path(folder), say, version
        self.seconds = 0.0

    def __call__(self, name: str, settings: Mapping[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of ``work``, kept from an earlier call where there is one.

        Args:
            name: what this is, for messages; a part of the key.
            settings: everything that determines the result, as JSON can hold it.
            work: measures; what it returns must be what JSON can hold.
        """
        path = self.folder / f"{self.key(name, settings)}.json"
        if path.exists():
            row = json.loads(path.read_text(encoding="utf-8"))
            self.say(f"{name}: kept from before ({row['seconds']:.1f} s)")
        else:
            start = time.perf_counter()
            result = work()
            row = {"name": name, "settings": dict(settings), "result": result, "seconds": time.perf_counter() - start}
            text = json.dumps(row, allow_nan=False)
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            part.write_text(text, encoding="utf-8")
            part.replace(path)
            self.say(f"{name}: {row['seconds']:.1f} s")
            row = json.loads(text)
        self.seconds += row["seconds"]
        result = row["result"]
        return dict(result)

    def key(self, name: str, settings: Mapping[str, Any]) -> str:
        """The same on every machine and in every run of the same code."""
        facts = {"name": name, "settings": dict(settings), "code": code_version(), "version": self.version}
        return hashlib.sha256(canonical(facts).encode()).hexdigest()[:32]
