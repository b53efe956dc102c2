"""Suites: what is compared with what, on which tasks, how often; ``quick`` and ``smoke`` come with the package."""

from __future__ import annotations

from attnlab.compare.suites.read import list_suites, load_suite, parse_suite, select
from attnlab.compare.suites.spec import REFERENCE, MixerChoice, Suite, TaskChoice, Timing

__all__ = [
    "REFERENCE",
    "MixerChoice",
    "Suite",
    "TaskChoice",
    "Timing",
    "list_suites",
    "load_suite",
    "parse_suite",
    "select",
]
