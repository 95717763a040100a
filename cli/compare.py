"""`assay compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.output import Json, Trust, console, distrust, print_json, save_plot

if TYPE_CHECKING:
    from study.compare import Group
    from study.statistics import Interval


def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT...",
            help="Run folders, or names of recipes, whose arms are compared.",
            show_default=False,
        ),
    ],
    metric: Annotated[str, typer.Option(help="What to draw, as train/ and val/ of it.")] = "loss",
    plot: Annotated[Path, typer.Option(help="Where the PNG goes.")] = Path("outputs/compare.png"),
    outputs: Annotated[str, typer.Option(help="Where recipes have their runs.")] = "outputs",
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Put runs side by side: what differs in their configurations, their metrics, and a plot.

    Runs that differ in their seed alone become one column: means with 95% intervals, and the
    difference to the first column over the seeds they share.
    """
    from study import compare as study
    from study import plots
    from study.collect import collect
    from study.recipe import is_path

    distrust(trust, any(map(is_path, what)))
    groups = collect(what, outputs).groups
    runs = [run for group in groups for run in group.runs]
    study.check_metric(runs, metric)
    changed = study.differences([group.config for group in groups], but=("seed",))
    drawn = {group.label: [run["lines"] for run in group.runs] for group in groups}
    save_plot(plots.curves(drawn, metric), plot)
    if json:
        keys = ("run_dir", "status", "step", "metrics")
        found = [{key: run[key] for key in keys} for run in runs]
        columns = [_as_json(group, groups[0]) for group in groups]
        print_json({"runs": found, "groups": columns, "differences": changed, "plot": str(plot)})
        return
    _show(groups, changed)
    console().print(f"plot: {plot}", highlight=False, markup=False, soft_wrap=True)


def _as_json(group: "Group", base: "Group") -> dict[str, object]:
    from study.compare import metrics

    rows = {}
    for name in metrics([group]):
        mean, difference = group.mean(name), group.difference(base, name)
        if mean is None:
            continue
        rows[name] = {"mean": mean[0], "interval": _ends(mean[1])}
        if difference is not None and group is not base:
            rows[name] |= {"difference": difference[0], "difference_interval": _ends(difference[1])}
    seeds = [run["config"]["seed"] for run in group.runs]
    return {"label": group.label, "seeds": seeds, "metrics": rows}


def _ends(interval: "Interval | None") -> list[float] | None:
    return [interval.low, interval.high] if interval else None


def _show(groups: list["Group"], changed: dict[str, list[object]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from study.compare import metrics, shown, with_interval

    table = Table(box=None, header_style="bold")
    for header in ("", *(group.label for group in groups)):
        table.add_column(Text(header))
    for key, values in changed.items():
        table.add_row(key, *(Text(shown(value)) for value in values))
    table.add_section()
    runs = [group.runs for group in groups]
    table.add_row("status", *(", ".join(dict.fromkeys(r["status"] for r in own)) for own in runs))
    table.add_row("step", *(_range([r["step"] for r in own]) for own in runs))
    if any(len(own) > 1 for own in runs):
        table.add_row("seeds", *(str(len(own)) for own in runs))
    for name in metrics(groups):
        found = [group.mean(name) for group in groups]
        if any(mean is not None for mean in found):
            table.add_row(name, *(Text(with_interval(*mean) if mean else "") for mean in found))
        apart = [g.difference(groups[0], name) if g is not groups[0] else None for g in groups]
        if any(difference is not None for difference in apart):
            cells = (Text(with_interval(*d, sign="+") if d else "") for d in apart)
            table.add_row(Text("  less the first", style="dim"), *cells, style="dim")
    console().print(table)


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
