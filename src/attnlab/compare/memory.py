"""Peak memory of a layer, from the operating system's count for a process that does nothing else."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from attnlab.compare.layers import Layer
from attnlab.compare.timing import Direction, layer_call

WARM_UP_TOKENS = 16


def peak_bytes(layer: Layer, tokens: int, direction: Direction, timeout: float = 120.0) -> int | None:
    """Bytes by which one call of the layer raises the resident memory of a fresh process.

    The process has run the layer on a few tokens before, so that libraries and parameters are not counted; inputs are.

    Returns:
        None where the operating system does not count, or the process died (memory ran out) or took too long.
    """
    if torch.device(layer.device).type == "cuda":
        return _peak_on_cuda(layer, tokens, direction)
    if sys.platform == "win32":
        return None
    # The server imports torch once and never runs it; each measurement is a fork of it, with a peak of its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "attnlab.compare.memory"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, layer, tokens, direction), daemon=True)
    process.start()
    sender.close()
    try:
        return int(receiver.recv()) if receiver.poll(timeout) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()
        receiver.close()


def _peak_on_cuda(layer: Layer, tokens: int, direction: Direction) -> int:
    """What torch's allocator gave out at most beyond what it had given before, parameters and inputs included in neither."""
    run = layer_call(layer, tokens, direction)
    run()
    torch.cuda.synchronize(layer.device)
    torch.cuda.reset_peak_memory_stats(layer.device)
    before = torch.cuda.memory_allocated(layer.device)
    run()
    torch.cuda.synchronize(layer.device)
    return torch.cuda.max_memory_allocated(layer.device) - before


def _measure(sender: Connection, layer: Layer, tokens: int, direction: Direction) -> None:
    import resource

    torch.set_num_threads(1)  # a thread's own buffers are not the mechanism's memory
    layer_call(layer, WARM_UP_TOKENS, direction)()
    before = _resident_bytes()
    _ = layer_call(layer, tokens, direction)()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    sender.send(max(0, peak - before))


def _resident_bytes() -> int:
    import resource

    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
