"""Write the table of mechanisms and the counts in README.md from the registry: ``python scripts/docs/readme.py [--check]``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sitegen import facts, prose

README = Path(__file__).parents[2] / "README.md"
_TABLE = re.compile(r"(<!-- mechanisms: begin[^\n]*-->\n).*?(<!-- mechanisms: end -->)", re.DOTALL)
_COUNTS = re.compile(r"\d+ mixers of a catalogue of \d+ papers")


def table() -> str:
    """A row a mixer."""
    lines = ["| mechanism | family | causal | streaming | cost | paper |", "|---|---|---|---|---|---|"]
    for row in facts.mixer_rows():
        cells = (
            f"`{row['name']}`",
            row["family"].replace("_", " "),
            row["causal"],
            row["streaming"],
            row["cost"],
            prose.cell(row["paper"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """A README with the table and the counts of today."""
    numbers = facts.numbers()
    text = _COUNTS.sub(f"{numbers['mixers']} mixers of a catalogue of {numbers['papers']} papers", text)
    return _TABLE.sub(lambda match: f"{match[1]}\n{table()}\n\n{match[2]}", text)


def main() -> None:
    """Write the file, or with ``--check`` exit with 1 where it would change."""
    text = README.read_text(encoding="utf-8")
    new = filled(text)
    if "--check" in sys.argv[1:]:
        raise SystemExit(f"{README.name} is behind the registry: run python scripts/docs/readme.py" if new != text else 0)
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
