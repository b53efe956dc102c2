"""What attnlab raises, and the near-miss hints that its messages carry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class AttnlabError(Exception):
    """Base of the errors that only attnlab raises."""


class UnsupportedError(AttnlabError, NotImplementedError):
    """A mechanism was asked for something that its definition does not have.

    Args:
        name: the mechanism, as it is registered.
        asked: what was asked of it, in words (``"causal=True"``).
        why: the reason, one clause.
        alternatives: names of registered mechanisms that can do it.
    """

    def __init__(self, name: str, asked: str, why: str = "", alternatives: Sequence[str] = ()) -> None:
        self.name, self.asked, self.alternatives = name, asked, tuple(alternatives)
        message = f"{name!r} does not support {asked}"
        if why:
            message += f": {why}"
        if alternatives:
            message += f". Mechanisms that do: {', '.join(alternatives)}"
        super().__init__(message + ".")


class UnknownNameError(AttnlabError, KeyError, ValueError):
    """A name that no registry entry, option or backend has."""

    def __str__(self) -> str:
        return str(self.args[0])


class BackendUnavailableError(AttnlabError, RuntimeError):
    """A backend was asked for by name, and this machine or this input cannot run it."""


class MissingPackageError(AttnlabError, ImportError):
    """An optional package is not installed."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The clause ``"; did you mean 'a' or 'b'?"``, or an empty string when nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    if not close:
        return ""
    return f"; did you mean {' or '.join(repr(match) for match in close)}?"
