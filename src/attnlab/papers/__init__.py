"""The 235 papers behind the library: facts, citations, and (`attnlab.papers.coverage`) what of each is built and proven here."""

from __future__ import annotations

from attnlab.papers.catalog import Paper, citation, paper, papers

__all__ = ["Paper", "citation", "paper", "papers"]
