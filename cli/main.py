"""`assay`: the application and what it does with errors."""

import os
import sys
from typing import Annotated, NoReturn

import typer

from cli.bench import app as bench
from cli.compare import compare
from cli.doctor import doctor
from cli.export import export
from cli.fit import fit
from cli.list import list_
from cli.new import app as new
from cli.report import report
from cli.reproduce import reproduce
from cli.run import run
from cli.sample import sample
from cli.show import show
from cli.sweep import sweep
from training.errors import EnvironmentFault, UsageError

app = typer.Typer(
    name="assay",
    help="Find out how good a training technique really is.",
    no_args_is_help=True,
    # Rich's help and tracebacks would double the time `assay --help` takes.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("run")(run)
app.command("list")(list_)
app.command("show")(show)
app.command("sweep")(sweep)
app.command("reproduce")(reproduce)
app.command("compare")(compare)
app.command("report")(report)
app.command("doctor")(doctor)
app.command("export")(export)
app.command("fit")(fit)
app.command("sample")(sample)
app.add_typer(bench, name="bench")
app.add_typer(new, name="new")

_CLICK_ERROR = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of every command."""


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 the machine failed or the run did, 2 a mistake."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    # A user's own package beside the shell's folder can be a `_target_`; ours go first.
    sys.path.append(os.getcwd())  # noqa: PTH109
    try:
        code = app(arguments, prog_name="assay", standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        sys.exit(_tell(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _tell(error: Exception) -> int:
    """One line on standard error; the exit code."""
    if isinstance(error, typer.Abort):
        text, code = "interrupted", 130
    elif isinstance(error, _CLICK_ERROR):
        text, code = error.format_message(), 2  # type: ignore[attr-defined]
    elif isinstance(error, UsageError):
        text, code = str(error), 2
    elif isinstance(error, EnvironmentFault):
        text, code = str(error), 1
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text, code = f"{where}{error.strerror or error}", 1
    else:
        from training import launch  # starting up needs none of it

        if launch.lost_peer(error):
            launch.await_end()
        text, code = f"{type(error).__name__}: {error} (traceback: --debug)", 1
    rank = os.environ.get("RANK", "0")
    if rank == "0" or code == 1:  # every process finds the same mistake
        process = f"process {rank}: " if rank != "0" else ""
        print(f"error: {process}{' '.join(text.split())}", file=sys.stderr)
    return code
