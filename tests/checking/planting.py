"""How a fault is planted: a subclass of a right toy, the check that has to find it, and words that it has to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnlab.core.contract import Mixer
from checking.toys import promising


@dataclass(frozen=True)
class Fault:
    """A broken mixer.

    Args:
        mixer: its class.
        check: the check that has to fail.
        says: what the check has to say, so that it fails for the fault and not by accident.
    """

    mixer: type[Mixer]
    check: str
    says: str


FAULTS: list[Fault] = []


def plant(check: str, says: str, **promises: Any) -> Callable[[type[Mixer]], type[Mixer]]:
    """Enter a subclass of a toy as a fault, with other promises where the lie is in a flag."""

    def enter(cls: type[Mixer]) -> type[Mixer]:
        right = cls.__mro__[1].info
        promising(cls, right.supports, right.example, **promises)
        FAULTS.append(Fault(cls, check, says))
        return cls

    return enter
