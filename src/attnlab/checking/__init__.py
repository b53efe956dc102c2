"""The conformance suite: the nine laws of a token mixer as named checks, for registered mixers and for users' own."""

from __future__ import annotations

from attnlab.checking.records import ConformanceError, Record, Report
from attnlab.checking.runner import check
from attnlab.checking.suite import CHECKS, Check, conformance

__all__ = ["CHECKS", "Check", "ConformanceError", "Record", "Report", "check", "conformance"]
