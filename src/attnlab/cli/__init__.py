"""The command line, ``attnlab``: it parses, calls the library, and prints."""

from __future__ import annotations


def main() -> None:
    """Run the command line on the arguments of this process; exits with 0 (fine), 1 (a check failed) or 2 (bad usage)."""
    from attnlab.cli.app import app

    app()
