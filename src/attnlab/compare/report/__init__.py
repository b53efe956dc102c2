"""The report: one HTML file that opens without a network."""

from __future__ import annotations

from attnlab.compare.report.page import Citation, write_report

__all__ = ["Citation", "write_report"]
