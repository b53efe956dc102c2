"""``python -m attnlab``: the command line, for launchers that start modules."""

from __future__ import annotations

from attnlab.cli import main

if __name__ == "__main__":
    main()
