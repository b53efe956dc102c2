"""The command line: one typer app, which registers the commands and turns errors of the user into one line."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from attnlab.core.errors import AttnlabError, UnknownNameError, nearest

COMMANDS = {
    "list": "attnlab.cli.list:list_command",
    "info": "attnlab.cli.info:info_command",
    "check": "attnlab.cli.check:check",
    "compare": "attnlab.cli.compare:compare",
    "bench": "attnlab.cli.bench:bench",
    "train": "attnlab.cli.train:train",
    "recommend": "attnlab.cli.recommend:recommend",
    "report": "attnlab.cli.report:report",
    "papers": "attnlab.cli.papers:papers_command",
    "claims": "attnlab.cli.claims:claims_command",
}
"""Name of each command and the function that it is, in the order of the help."""

USER_ERRORS = (AttnlabError, ValueError)
"""What a wrong name, option or value raises. Anything else is a fault of ours and keeps its traceback."""


class Commands(TyperGroup):
    """Commands that are imported when asked for, and whose errors of the user are one line and exit code 2.

    With ``ATTNLAB_TRACEBACK=1`` these errors keep their traceback.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand:
        """The command called ``cmd_name``; UnknownNameError names the nearest ones."""
        if cmd_name not in COMMANDS:
            known = nearest(cmd_name, COMMANDS) or f"; commands: {', '.join(COMMANDS)}"
            raise UnknownNameError(f"unknown command {cmd_name!r}{known}")
        return load(cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            if os.environ.get("ATTNLAB_TRACEBACK", "0") != "0":
                raise
            print(f"attnlab: {error}", file=sys.stderr)
            raise typer.Exit(2) from error


@functools.cache
def load(name: str) -> TyperCommand:
    """Import the function of a command and make the command of it."""
    module, _, attribute = COMMANDS[name].partition(":")
    single = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    single.command(name)(getattr(importlib.import_module(module), attribute))
    command = typer.main.get_command(single)
    if not isinstance(command, TyperCommand):
        raise TypeError(f"command {name!r}: expected a single command, got {type(command).__name__}")
    return command


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"attnlab {version('attnlab')}")
        raise typer.Exit
    return wanted


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Attention mechanisms under one contract: find one, read what it is, prove it, compare it on this machine.

    Examples: `attnlab list --causal --streaming`, `attnlab info delta_net`, `attnlab check my_file.py:MyMixer`, `attnlab compare`

    Exit codes: 0 fine, 1 a check or a comparison failed, 2 bad usage.
    """
