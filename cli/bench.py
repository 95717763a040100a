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
    overrides: Overrides = None, steps: Steps = 300, rounds: Rounds = 11, json: Json = False
) -> None:
    """The same small GPT with assay, transformers.Trainer and Lightning, in turns."""
    import importlib.util

    from study import bench
    from training.errors import UsageError

    if importlib.util.find_spec("lightning") is None:
        raise UsageError("bench peers: lightning is not installed; pip install 'assay[peers]'")
    result = bench.peers(overrides or [], steps, rounds)
    _show(result, {f"{n}'s time over assay's": r for n, r in result["ratios"].items()}, json)


@app.command("kernels")
def kernels(
    op: Annotated[
        list[str] | None, typer.Option(help="Operation, repeatable; default: all.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Sizes to replace: tokens=4096,dim=512.")] = "",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: what there is.")] = None,
    peers: Annotated[bool, typer.Option(help="Measure other implementations too.")] = True,
    repeats: Annotated[int, typer.Option(help="Repetitions; medians are over these.", min=1)] = 5,
    json: Json = False,
) -> None:
    """Time, peak memory and error of every implementation of every operation, and of its peers."""
    import torch

    from kernels import aot, bench
    from training.errors import UsageError, nearest

    for name in op or []:
        if name not in aot.ops():
            raise UsageError(f"--op: no operation '{name}'{nearest(name, aot.ops())}")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        rows = bench.measure(op, bench.parse_shape(shape), where, peers, repeats)
    except ValueError as error:
        raise UsageError(f"bench kernels: {error}") from error
    if json:
        print_json({"environment": bench.environment(where), "rows": rows})
        return
    print(bench.format_rows(rows))


def _show(result: dict, ratios: dict[str, float], json: bool) -> None:
    if json:
        print_json(result)
        return
    out = console()
    for name, speed in result["steps_per_second"].items():
        out.print(f"{name}: {speed:.2f} steps/s", highlight=False)
    for name, value in ratios.items():
        out.print(f"{name}: {value:.3f}", highlight=False)
