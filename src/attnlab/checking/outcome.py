"""How a check ends other than well."""

from __future__ import annotations

from attnlab.core.errors import AttnlabError


class Violation(AttnlabError):
    """A law is broken; the message says which demand, on which input, by how much."""


class NotApplicable(AttnlabError):
    """A check has nothing to look at in this mixer; the message says why."""
