"""Ranks that are threads of this process and take turns: the same code as between processes, to test and to look at."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Generic, TypeVar

import torch
from torch import Tensor

from attnlab.parallel.packing import Kind, message_size
from attnlab.parallel.ranks import Gathered, Ranks, Traffic

T = TypeVar("T")


class SimulatedRanks(Ranks, Generic[T]):
    """Threads of which one runs at a time, from one gather to the next, in the order of their ranks.

    Autograd needs no collective: the tensors of the others are handed over with their history.

    Args:
        size: how many.
        traffic: where to count what processes would send forward, or None.
    """

    def __init__(self, size: int, traffic: Traffic | None = None) -> None:
        super().__init__(size, traffic)
        self._here = threading.local()
        self._go = [threading.Semaphore(0) for _ in range(size)]
        self._paused = threading.Semaphore(0)
        self._given: list[tuple[str, list[Tensor]] | None] = [None] * size
        self._results: list[T | None] = [None] * size
        self._errors: list[BaseException | None] = [None] * size
        self._ended = [False] * size
        self._board: list[list[Tensor]] = []
        self._abandoned = False

    @property
    def rank(self) -> int:
        """The rank whose turn it is."""
        return self._here.rank

    def gather(self, what: str, tensors: Sequence[Tensor], *, uneven: bool = False, gradient: bool = False) -> Gathered:
        """See `Ranks`."""
        self._given[self.rank] = (what, list(tensors))
        self._paused.release()
        self._go[self.rank].acquire()
        if self._abandoned:
            raise _Abandoned
        if uneven:
            self.count("shapes", message_size([Kind((sum(t.dim() for t in tensors),), torch.int64)]) * (self.size - 1))
        longest = max(message_size([Kind.of(tensor) for tensor in piece]) for piece in self._board)
        self.count(what, longest * (self.size - 1))
        return Gathered(self._board)

    def tie(self, x: Tensor, token: Tensor | None) -> Tensor:
        """``x``: one graph holds all ranks."""
        return x

    def run(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """What each rank's work gives; the first error of the lowest rank ends all."""
        around = _surroundings()
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(self._work, rank, work, around), daemon=True)
            for rank, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        while not all(self._ended):
            for rank in range(self.size):
                self._take_turn(rank)
            self._abandoned |= any(error is not None for error in self._errors)
            posted = [given for given in self._given if given is not None]
            if not self._abandoned and posted:
                self._exchange(posted)
        for thread in threads:
            thread.join()
        for error in self._errors:
            if error is not None and not isinstance(error, _Abandoned):
                raise error
        return self._results  # type: ignore[return-value]

    def _take_turn(self, rank: int) -> None:
        if not self._ended[rank]:
            self._given[rank] = None
            self._go[rank].release()
            self._paused.acquire()

    def _exchange(self, posted: Sequence[tuple[str, list[Tensor]]]) -> None:
        """Put up what all gave; if they are not at the same place, processes would wait for each other for ever."""
        if len(posted) < self.size or len({what for what, _ in posted}) > 1:
            self._abandoned = True
            at = [given[0] if given is not None else "the end" for given in self._given]
            self._errors[0] = RuntimeError(f"ranks: expected all at the same collective, got {at}")
            return
        self._board = [tensors for _, tensors in posted]

    def _work(self, rank: int, work: Callable[[], T], around: Callable[[], ExitStack]) -> None:
        self._here.rank = rank
        self._go[rank].acquire()
        try:
            with around():
                self._results[rank] = work()
        except BaseException as error:
            self._errors[rank] = self._errors[rank] or error
        finally:
            self._given[rank], self._ended[rank] = None, True
            self._paused.release()


class _Abandoned(BaseException):
    """Ends a rank that waits for others that have failed."""


def _surroundings() -> Callable[[], ExitStack]:
    """What is set for this thread alone, to be set in others: whether there are gradients, and autocast."""
    gradients, cast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu")

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.set_grad_enabled(gradients))
        if cast:
            stack.enter_context(torch.autocast("cpu", dtype=dtype))
        return stack

    return enter
