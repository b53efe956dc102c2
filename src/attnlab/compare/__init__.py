"""Comparing mechanisms: a grid of training runs at matched budgets, their ledger, layer costs, statistics, and one report."""

from __future__ import annotations

from attnlab.compare.report import Citation
from attnlab.compare.run import Results, compare, make_report
from attnlab.compare.suites import MixerChoice, Suite, TaskChoice, Timing, list_suites, load_suite
from attnlab.compare.summary import Summary

__all__ = [
    "Citation",
    "MixerChoice",
    "Results",
    "Suite",
    "Summary",
    "TaskChoice",
    "Timing",
    "compare",
    "list_suites",
    "load_suite",
    "make_report",
]
