"""What mkdocs calls: it adds the generated pages and their navigation, fills in live numbers, and turns LaTeX into MathML."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from sitegen import facts, macros, mathml, pages

from attnlab.core.catalog import mixers

_log = logging.getLogger("mkdocs.hooks.attnlab")  # under mkdocs, so that --strict counts its warnings
_equations: dict[str, dict[str, str]] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation: a page a mixer, a page a registry."""
    families = [
        {family.replace("_", " ").capitalize(): [{name: f"mechanisms/{name}.md"} for name in names]}
        for family, names in facts.families().items()
    ]
    for module, error in mixers.broken.items():
        _log.warning("%s could not be imported, so what it registers has no page: %s", module, error)
    reference = [{"Ops": "reference/ops.md"}]
    reference += [{pages.part_title(kind): pages.part_path(kind)} for kind in facts.parts()]
    for section in config.nav or []:
        section |= {"Mechanisms": ["mechanisms/index.md", *families]} if "Mechanisms" in section else {}
        section |= {"Reference": reference} if "Reference" in section else {}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated files."""
    for path, content in pages.generated().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the numbers of a page written by hand, and set the equations aside, out of Markdown's way."""
    if page.file.generated_by is None:
        markdown = macros.fill(markdown, page.file.src_uri)
    markdown, _equations[page.file.src_uri] = mathml.hide(markdown)
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the equations back."""
    return mathml.reveal(html, _equations.pop(page.file.src_uri))
