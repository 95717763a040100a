"""Pieces the commands share."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="One JSON value on the last line of output.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import what a recipe's file, a run or a sweep names, from whatever package.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Plain lines, no progress bar.")]


def distrust(trust: bool, others: bool) -> None:
    """Unless trusted, import known components alone where a configuration may be somebody else's.

    A run's and a sweep's folder may be, and a recipe that is given by its path.
    """
    if others and not trust:
        from training import components

        components.distrust()


def console(stderr: bool = False) -> "Console":
    """Where people read: standard output, or standard error beside `--json`."""
    from rich.console import Console

    return Console(stderr=stderr)


def save_plot(drawn: "Figure", path: Path) -> None:
    """Write a figure where `--plot` says.

    Raises:
        EnvironmentFault: when it cannot be written.
    """
    from study import plots
    from training.errors import EnvironmentFault

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plots.save(drawn, path)
    except OSError as error:
        raise EnvironmentFault(f"--plot {path}: {error.strerror}") from error


def print_json(value: Any) -> None:
    """Print a value on one line of standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()
