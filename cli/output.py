"""Pieces the commands share."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="One JSON value on the last line of output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Plain lines, no progress bar.")]


def console(stderr: bool = False) -> "Console":
    """Where people read: standard output, or standard error beside `--json`."""
    from rich.console import Console

    return Console(stderr=stderr)


def print_json(value: Any) -> None:
    """Print a value on one line of standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()
