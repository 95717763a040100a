"""`assay fit`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import complete
from cli.output import Json, Trust, console, distrust, print_json, save_plot

if TYPE_CHECKING:
    from study.fitting import Fit


def fit(
    law: Annotated[str, typer.Argument(help="A law's name.", autocompletion=complete.law)],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="More runs.", show_default=False)
    ] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option(help="Run folders, recipes, or a sweep, to fit to.", show_default=False),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="In place of runs a file of points, with a header.", show_default=False),
    ] = None,
    metric: Annotated[str, typer.Option(help="Of runs, the loss.")] = "val/loss",
    x: Annotated[
        str | None,
        typer.Option(
            help="What a law of one quantity is of: parameters, tokens, compute, a column of the "
            "file, or a key as model.width.",
            show_default=False,
        ),
    ] = None,
    other: Annotated[
        str | None,
        typer.Option(help="The other loss of loss_to_loss, a metric.", show_default=False),
    ] = None,
    hold_out: Annotated[
        int, typer.Option(min=0, help="So many of the largest are predicted, not fitted.")
    ] = 0,
    resamples: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 200,
    plot: Annotated[Path, typer.Option(help="Where the PNG goes.")] = Path("outputs/fit.png"),
    outputs: Annotated[str, typer.Option(help="Where recipes have their runs.")] = "outputs",
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Fit a scaling law to runs or published points, with intervals and the error of prediction."""
    from study import fitting, laws
    from study.collect import collect
    from study.fit_plot import draw
    from study.points import from_csv, from_runs
    from study.recipe import is_path
    from training.errors import UsageError

    chosen = laws.find(law)
    named = [*(runs or []), *(more or [])]
    if bool(named) == (csv is not None):
        raise UsageError("fit: give runs, or a file of points as --csv, not both")
    distrust(trust, any(map(is_path, named)))
    if csv is not None:
        points = from_csv(csv, chosen, x)
    else:
        found = [run for group in collect(named, outputs).groups for run in group.runs]
        points = from_runs(found, chosen, metric, x, other)
    held = points.largest(hold_out)
    try:
        result = fitting.fit(chosen, points.columns, points.losses, held, resamples, points.groups)
    except ValueError as error:
        raise UsageError(f"fit {law}: {error}") from error
    save_plot(draw(result, points.columns), plot)
    if json:
        print_json({"law": law, "formula": chosen.formula, **as_json(result), "plot": str(plot)})
        return
    _show(law, result)
    console().print(f"plot: {plot}", highlight=False, markup=False, soft_wrap=True)


def as_json(result: "Fit") -> dict[str, Any]:
    """What was fitted, coefficients and not their logarithms."""
    from study.fitting import shown

    rows = {name: (value, interval) for name, value, interval in shown(result)}
    return {
        "values": {name: value for name, (value, _) in rows.items()},
        "intervals": {name: interval for name, (_, interval) in rows.items() if interval},
        "objective": result.objective,
        "rows": int((~result.held_out).sum()),
        "error": result.fitted_error,
        "held_out": int(result.held_out.sum()),
        "held_out_error": result.error,
    }


def _show(name: str, result: "Fit") -> None:
    from rich.table import Table

    from study.fitting import shown

    out = console()
    out.print(f"{name}: L = {result.law.formula}", highlight=False, markup=False, soft_wrap=True)
    table = Table("", "value", "95% interval", box=None)
    for label, value, interval in shown(result):
        span = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
        table.add_row(label, f"{value:.5g}", span)
    out.print(table)
    rows = int((~result.held_out).sum())
    out.print(f"error: {result.fitted_error:.2%} of {rows} rows it was fitted to", highlight=False)
    if result.error is not None:
        largest = int(result.held_out.sum())
        out.print(f"error: {result.error:.2%} of the {largest} held out", highlight=False)
