"""Generation in pieces that are kept on disk, so that a long one can be stopped and gone on with."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Make = Callable[[int, int], Arrays]


def build_shards(
    make: Make,
    sizes: Sequence[int],
    *,
    folder: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    processes: int = 1,
    first: int = 0,
) -> list[Arrays]:
    """Pieces of a data set, made where they are not in ``folder`` yet; a progress bar is shown on a terminal.

    Args:
        make: number and size of a piece to its arrays; the number alone decides what chance gives. With several processes it
            must be picklable, and a script that calls this needs the ``if __name__ == "__main__"`` of multiprocessing.
        sizes: of the pieces.
        folder: where each piece is kept as an ``.npz`` file, whole or not at all; None keeps none.
        facts: what determines the data; the folder remembers it.
        processes: that make pieces.
        first: number of the first piece.

    Raises:
        ValueError: if the folder holds pieces of other facts, or ``processes`` is not positive.
    """
    if processes < 1:
        raise ValueError(f"processes: expected a positive integer, got {processes}")
    if folder is not None:
        _claim(folder, dict(facts or {}))
    pieces: dict[int, Arrays] = {}
    todo = {}
    for number, size in enumerate(sizes, first):
        file = None if folder is None else folder / f"shard-{number:05}.npz"
        if file is not None and file.exists():
            with np.load(file, allow_pickle=False) as stored:
                pieces[number] = {name: stored[name] for name in stored.files}
        else:
            todo[number] = (size, file)
    with _progress(sum(size for size, _ in todo.values())) as advance:
        for number, arrays in _make_all(make, {number: size for number, (size, _) in todo.items()}, processes):
            size, file = todo[number]
            pieces[number] = arrays
            if file is not None:
                _write(file, arrays)
            advance(size)
    return [pieces[number] for number in sorted(pieces)]


def _make_all(make: Make, sizes: dict[int, int], processes: int) -> Iterator[tuple[int, Arrays]]:
    if processes == 1 or len(sizes) < 2:
        for number, size in sizes.items():
            yield number, make(number, size)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(make, number, size): number for number, size in sizes.items()}
        for future in as_completed(running):
            yield running[future], future.result()


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file, text = folder / "settings.json", json.dumps(facts, indent=1, sort_keys=True)
    if not file.exists():
        file.write_text(text, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"path: {folder} holds a data set of other settings (settings.json): expected {text}; give another folder"
        )


def _write(file: Path, arrays: Arrays) -> None:
    handle, part = tempfile.mkstemp(prefix=file.name, suffix=".part", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        os.replace(part, file)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def piece_sizes(total: int, whole: int, *, kept: bool) -> list[int]:
    """Sizes of the pieces of ``total`` examples: all ``whole`` where they are kept for other totals, else no more than needed."""
    count = -(-total // whole)
    return [whole] * count if kept else [whole] * (count - 1) + [total - whole * (count - 1)]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("generating", total=total)
        yield lambda done: bars.advance(bar, done)
