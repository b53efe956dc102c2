"""Papers in the form that reports cite them."""

from __future__ import annotations

from attnlab.compare import Citation
from attnlab.papers import papers


def citations() -> dict[str, Citation]:
    """Every paper of the catalogue by its slug."""
    return {paper.slug: Citation(paper.title, paper.year, paper.arxiv) for paper in papers()}
