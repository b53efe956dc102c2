"""The ranks that share a sequence, as the mechanism sees them: one operation, a gather, and a tally of what it sends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Sent:
    """One collective as one rank took part in it.

    Args:
        what: "header", "masks", "halo", "shapes", "summary" or "gradients", and with " backward" their gradients.
        rank: who sent.
        bytes: what it handed to others, counted once for each of them.
    """

    what: str
    rank: int
    bytes: int


@dataclass
class Traffic:
    """A tally of what collectives sent.

    traffic = Traffic()
    layer = sequence_parallel(mixer, traffic=traffic)

    Args:
        sent: every collective in order; of this process's rank, or of all ranks where they are simulated.
    """

    sent: list[Sent] = field(default_factory=list)

    def bytes(self, what: str | None = None) -> int:
        """Bytes sent, all together or of one kind."""
        return sum(one.bytes for one in self.sent if what is None or one.what == what)

    def calls(self, what: str | None = None) -> int:
        """Collectives that were counted, all together or of one kind."""
        return sum(1 for one in self.sent if what is None or one.what == what)

    def clear(self) -> None:
        """Begin anew."""
        self.sent.clear()


class Gathered(NamedTuple):
    """What `Ranks.gather` gives.

    Args:
        pieces: the tensors of every rank, by rank.
        token: what `Ranks.tie` takes, so that backward passes here on every rank; None where there is no backward.
    """

    pieces: list[list[Tensor]]
    token: Tensor | None = None


class Ranks(ABC):
    """The members of a group, each with a piece of the sequence.

    Args:
        size: how many.
        traffic: where to count, or None.
    """

    def __init__(self, size: int, traffic: Traffic | None = None) -> None:
        self.size, self.traffic = size, traffic

    @property
    @abstractmethod
    def rank(self) -> int:
        """Which of them runs this code."""

    @abstractmethod
    def gather(self, what: str, tensors: Sequence[Tensor], *, uneven: bool = False, gradient: bool = False) -> Gathered:
        """The tensors of all ranks, in one collective.

        Args:
            what: name for `Traffic`.
            tensors: as many on every rank, of the same dtypes and numbers of dimensions.
            uneven: whether shapes may differ between ranks; they are then exchanged first.
            gradient: whether to differentiate, which every rank must agree on: backward is one collective too, in which
                each rank gets the sum of all ranks' gradients with respect to what it gave.
        """

    @abstractmethod
    def tie(self, x: Tensor, token: Tensor | None) -> Tensor:
        """``x``, whose backward makes the collective of ``token`` run its own, also where nothing else came of it."""

    def count(self, what: str, sent: int) -> None:
        """Add ``sent`` bytes to the tally."""
        if self.traffic is not None:
            self.traffic.sent.append(Sent(what, self.rank, sent))
