"""`assay compare`."""

from pathlib import Path
from typing import Annotated

import typer

from cli.output import Json, console, print_json


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    metric: Annotated[str, typer.Option(help="What to draw, as train/ and val/ of it.")] = "loss",
    plot: Annotated[Path, typer.Option(help="Where the PNG goes.")] = Path("outputs/compare.png"),
    json: Json = False,
) -> None:
    """Put runs side by side: what differs in their configurations, their metrics, and a plot."""
    from study import plots
    from study.compare import check_metric, differences, labels, load
    from training.errors import EnvironmentFault

    loaded = [load(folder) for folder in runs]
    check_metric(loaded, metric)
    names = labels(loaded)
    changed = differences([run["config"] for run in loaded])
    try:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plots.losses({n: run["lines"] for n, run in zip(names, loaded)}, plot, metric)
    except OSError as error:
        raise EnvironmentFault(f"--plot {plot}: {error.strerror}") from error
    if json:
        keys = ("run_dir", "status", "step", "metrics")
        found = [{key: run[key] for key in keys} for run in loaded]
        print_json({"runs": found, "differences": changed, "plot": str(plot)})
        return

    from rich.table import Table
    from rich.text import Text

    table = Table("", *names, box=None, header_style="bold")
    for key, values in changed.items():
        table.add_row(key, *(Text(_shown(value)) for value in values))
    table.add_section()
    table.add_row("status", *(run["status"] for run in loaded))
    table.add_row("step", *(str(run["step"]) for run in loaded))
    metrics = dict.fromkeys(key for run in loaded for key in run["metrics"])
    for key in sorted(metrics, key=lambda key: (not key.startswith("val/"), key)):
        values = [run["metrics"].get(key) for run in loaded]
        table.add_row(key, *(Text("" if v is None else _shown(v)) for v in values))
    out = console()
    out.print(table)
    out.print(f"plot: {plot}", highlight=False, markup=False, soft_wrap=True)


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
