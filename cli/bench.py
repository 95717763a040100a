"""`assay bench`."""

from typing import Annotated

import typer

from cli.output import Json, console, print_json
from cli.run import Overrides

app = typer.Typer(help="Measure what assay costs.", no_args_is_help=True, rich_markup_mode=None)
Steps = Annotated[int, typer.Option(help="Steps in a block.", min=2)]
Rounds = Annotated[int, typer.Option(help="Blocks of each trainer; medians are over these.", min=1)]


@app.command("loop")
def loop(
    overrides: Overrides = None, steps: Steps = 30, rounds: Rounds = 11, json: Json = False
) -> None:
    """The same GPT with assay's trainer and with a bare PyTorch loop, in turns."""
    from study import bench

    result = bench.loop(overrides or [], steps, rounds)
    _show(result, {"assay's time over the bare loop's": result["ratio"]}, json)


@app.command("peers")
def peers(
    overrides: Overrides = None, steps: Steps = 30, rounds: Rounds = 11, json: Json = False
) -> None:
    """The same GPT with assay, transformers.Trainer and Lightning, in turns."""
    import importlib.util

    from study import bench
    from training.errors import UsageError

    if importlib.util.find_spec("lightning") is None:
        raise UsageError("bench peers: lightning is not installed; pip install 'assay[peers]'")
    result = bench.peers(overrides or [], steps, rounds)
    _show(result, {f"{n}'s time over assay's": r for n, r in result["ratios"].items()}, json)


def _show(result: dict, ratios: dict[str, float], json: bool) -> None:
    if json:
        print_json(result)
        return
    out = console()
    for name, speed in result["steps_per_second"].items():
        out.print(f"{name}: {speed:.2f} steps/s", highlight=False)
    for name, value in ratios.items():
        out.print(f"{name}: {value:.3f}", highlight=False)
