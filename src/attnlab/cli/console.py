"""Where commands print: a console that does not cut what is piped, and JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 200
"""Columns where the output is no terminal and ``COLUMNS`` says nothing: tables keep one row a line for grep."""
ROOMY = 110
"""Columns from which on tables have a column of prose; in a narrower terminal it would be a tower of single words."""


def console() -> Console:
    """A console on standard output."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPED_WIDTH if piped else None, highlight=False)


def print_json(data: Any) -> None:
    """Plain data as indented JSON on standard output; text is not escaped."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def plain_table(*columns: str) -> Table:
    """A table without a frame, with these columns; in a narrow terminal the last one wraps, the others keep their width."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column != columns[-1])
    return table
