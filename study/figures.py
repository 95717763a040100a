"""Figures of a recipe's report: functions of the table of runs (`study.analyses`)."""

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from study import fit_plot
from study.analyses import Table, compression, laws, scaling
from study.analyses.layers import profile
from study.plots import COLOURS, INK, band, figure, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(table: Table, *, metric: str = "probe/attention_entropy", label: str = "") -> "Figure":
    """The last value of `<metric>/<layer>/<head>`, averaged over seeds: layers by heads, one panel
    an arm, all on one scale.

    Args:
        label: of the scale; default the metric.

    Raises:
        ValueError: for runs without the metric.
    """
    name = re.compile(rf"{re.escape(metric)}/(\d+)/(\d+)")
    sums: dict[str, dict[tuple[int, int], list[float]]] = {}
    for run in table:
        for key, value in run["metrics"].items():
            if match := name.fullmatch(key):
                cell = int(match[1]), int(match[2])
                sums.setdefault(run["arm"], {}).setdefault(cell, []).append(value)
    if not sums:
        raise ValueError(f"metric: the runs have no '{metric}/<layer>/<head>'")
    grids = {}
    for arm, cells in sums.items():
        grid = np.full([max(cell[axis] for cell in cells) + 1 for axis in (0, 1)], math.nan)
        for cell, values in cells.items():
            grid[cell] = np.mean(values)
        grids[arm] = grid
    low, high = min(map(np.nanmin, grids.values())), max(map(np.nanmax, grids.values()))
    drawn = figure(8, 3.4)
    panels = drawn.subplots(1, len(grids), squeeze=False)[0]
    image: Any = None
    for axes, (arm, grid) in zip(panels, grids.items()):
        image = axes.imshow(grid, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_title(arm, fontsize=9)
        axes.set_xlabel("head")
        axes.set_xticks(range(grid.shape[1]))
        axes.set_yticks(range(grid.shape[0]))
        if grid.size <= 64:
            for (y, x), value in np.ndenumerate(grid):
                light = (value - low) / max(high - low, 1e-12) > 0.6
                colour = "#111111" if light else "#ffffff"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    panels[0].set_ylabel("layer")
    drawn.colorbar(image, ax=list(panels), label=label or metric)
    return drawn


def by_layer(table: Table, *, metric: str, log: bool = True) -> "Figure":
    """The first recorded value of `<metric>/<layer>`: the mean over seeds of each arm, with a band
    from the lowest to the highest.

    Args:
        log: whether its axis is logarithmic.

    Raises:
        ValueError: for runs without the metric.
    """
    arms: dict[str, list[list[float]]] = {}
    for run in table:
        if run["metrics"] and any(key.startswith(f"{metric}/") for key in run["metrics"]):
            arms.setdefault(run["arm"], []).append(profile(run, metric))
    if not arms:
        raise ValueError(f"metric: the runs have no '{metric}/<layer>'")
    drawn = figure(8, 4)
    axes = drawn.add_subplot()
    for number, (arm, rows) in enumerate(arms.items()):
        values = dict(enumerate(zip(*rows)))
        spread(axes, values, COLOURS[number % len(COLOURS)], marker="o", ms=4, label=arm)
    if log:
        axes.set_yscale("log")
    axes.set_xticks(range(max(len(rows[0]) for rows in arms.values())))
    _finish(axes, "layer", metric)
    return drawn


def over_steps(table: Table, *, metric: str, log: bool = False) -> "Figure":
    """Any metric over steps: each arm's mean over seeds, with a band from the lowest to the
    highest.

    Args:
        log: whether the metric's axis is logarithmic.
    """
    drawn = figure(8, 4)
    axes = drawn.add_subplot()
    for number, arm in enumerate(dict.fromkeys(run["arm"] for run in table)):
        lines = [run["lines"] for run in table if run["arm"] == arm]
        band(axes, lines, metric, COLOURS[number % len(COLOURS)], label=arm)
    if log:
        axes.set_yscale("log")
    _finish(axes, "step", metric)
    return drawn


def estimator(table: Table) -> "Figure":
    """What `study.probes.estimator.Estimator` records over steps, mean and range over seeds of each
    arm: the bias, and dotted the one that chance alone gives to so many draws; the variance, and
    dotted that of exact gradients of mini-batches."""
    drawn = figure(10, 4)
    pairs = {"bias": "bias_error", "variance": "batch_variance"}
    for axes, (name, other) in zip(drawn.subplots(1, 2), pairs.items()):
        for number, arm in enumerate(dict.fromkeys(run["arm"] for run in table)):
            lines = [run["lines"] for run in table if run["arm"] == arm]
            colour = COLOURS[number % len(COLOURS)]
            band(axes, lines, f"estimator/{name}", colour, label=arm, marker="o", ms=4)
            band(axes, lines, f"estimator/{other}", colour, ls=":")
        axes.set_yscale("symlog", linthresh=1e-4)
        _finish(axes, "step", f"{name} (dotted: {other.replace('_', ' ')})")
    return drawn


def memory(table: Table, *, arms: list[str] | None = None, metric: str = "train/loss") -> "Figure":
    """Loss curves beside what `study.probes.memory.StepMemory` records of each arm, averaged over
    seeds: bars of a step's peak memory, and of its FLOPs, filled for the share recomputed.

    Args:
        arms: those drawn, in this order; default: all.
        metric: of the curves.

    Raises:
        ValueError: for an arm without the probe's metrics.
    """
    names = arms or list(dict.fromkeys(run["arm"] for run in table))
    drawn = figure(10, max(3.2, 1.4 + 0.45 * len(names)))
    curves, memory, work = drawn.subplots(1, 3, width_ratios=[2, 1, 1])
    means = {arm: [_mean(table, arm, f"probe/{key}") for key in COSTS] for arm in names}
    unit, name = _unit(max(total for _, total, _ in means.values()))
    for number, (arm, (peak, total, again)) in enumerate(means.items()):
        colour = COLOURS[number % len(COLOURS)]
        lines = [run["lines"] for run in table if run["arm"] == arm]
        width = 1.5 + 2 * (len(names) - 1 - number)  # equal curves would hide each other
        band(curves, lines, metric, colour, label=arm, lw=min(width, 8))
        bars = [
            (memory, {"width": peak, "color": colour}, f"{peak:.3g}"),
            (work, {"width": total / unit, "edgecolor": colour, "fill": False}, ""),
            (work, {"width": again / unit, "color": colour}, f"{again / total:.0%}"),
        ]
        for axes, style, text in bars:
            bar = axes.barh(number, height=0.6, **style)
            axes.bar_label(bar, [text], padding=3, fontsize=8)
    for axes, label in ((memory, "peak memory of a step (MiB)"), (work, f"{name} of a step")):
        axes.set_yticks(range(len(names)), names if axes is memory else [""] * len(names))
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_axisbelow(True)
        _finish(axes, label, "")
    work.set_title("filled: recomputed", fontsize=9)
    _finish(curves, "step", metric)
    return drawn


COSTS = ("step_memory", "step_flops", "recomputed_flops")


def _mean(table: Table, arm: str, metric: str) -> float:
    values = [r["metrics"][metric] for r in table if r["arm"] == arm and metric in r["metrics"]]
    if not values:
        raise ValueError(f"arms: no run of '{arm}' has '{metric}' (callbacks: StepMemory)")
    return sum(values) / len(values)


def _unit(flops: float) -> tuple[float, str]:
    power = min(int(math.log10(max(flops, 1)) // 3), 4)
    return 1000.0**power, ("", "k", "M", "G", "T")[power] + "FLOP"


def over_arms(table: Table, *, metric: str, log: bool = False) -> "Figure":
    """The last value of a metric over the arms' learning rates, one line for each family of arms
    (the name before its last `_`): mean over seeds, band from the lowest to the highest. A learning
    rate of 0 is left out.

    Args:
        log: whether the metric's axis is logarithmic.
    """
    families: dict[str, dict[float, list[float]]] = {}
    for run in table:
        value, rate = run["metrics"].get(metric), run["config"]["optimizer"]["lr"]
        if isinstance(value, int | float) and rate > 0:
            family = run["arm"].rpartition("_")[0] or run["arm"]
            families.setdefault(family, {}).setdefault(rate, []).append(value)
    drawn = figure(8, 4)
    axes = drawn.add_subplot()
    for number, (family, rates) in enumerate(families.items()):
        spread(axes, rates, COLOURS[number % len(COLOURS)], marker="o", ms=4, label=family)
    axes.set_xscale("log")
    axes.set_yscale("log" if log else "linear")
    _finish(axes, "learning rate", metric)
    return drawn


def law(table: Table, *, held_out: str, metric: str = "val/loss") -> "Figure":
    """Measured losses over what the fitted scaling law says, by seed; the held-out arm in another
    colour. For the arguments see `study.analyses.scaling.fit`."""
    drawn = figure(8, 4.5)
    axes = drawn.add_subplot()
    ends: list[float] = []
    for _, rest, target in scaling.by_seed(table, held_out, metric):
        if len(rest) < 6:
            continue
        sizes = np.array([scaling.size(r) for r in rest])
        found = scaling.solve(sizes, np.array([r["metrics"][metric] for r in rest]))
        for run in [*rest, target] if target else rest:
            predicted = float(scaling.predict(found, np.array([scaling.size(run)]))[0])
            out = run["arm"] == held_out
            style: dict[str, Any] = {"color": COLOURS[out], "ms": 9 if out else 4}
            axes.plot(predicted, run["metrics"][metric], "*" if out else "o", **style)
            ends += [predicted, run["metrics"][metric]]
    if ends:
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=INK, lw=1, ls=":")
        axes.plot([], [], "o", color=COLOURS[0], label="fitted")
        axes.plot([], [], "*", color=COLOURS[1], label="held out")
    _finish(axes, f"{metric} by the law", f"{metric} measured")
    return drawn


def fit(table: Table, **arguments: Any) -> "Figure":
    """Measured losses over those of a law fitted to each seed's runs, and what is left over against
    each of its columns; arms that were held out in another colour.

    Args:
        table: the runs.
        arguments: those of `study.analyses.laws.by_seed`.
    """
    found = list(laws.by_seed(table, **arguments))
    results = [result for _, result, _ in found]

    def rows(name: str) -> np.ndarray:
        return np.concatenate([getattr(result, name) for result in results])

    together = {name: rows(name) for name in ("predicted", "measured", "held_out")}
    columns = {
        name: np.concatenate([columns[name] for _, _, columns in found])
        for name in results[0].law.columns
    }
    drawn = fit_plot.draw(dataclasses.replace(results[0], **together), columns)
    for axes in drawn.axes:
        if axes.get_xlabel() == "x":
            axes.set_xlabel(arguments["x"])
    return drawn


def over_bytes(
    table: Table,
    *,
    curves: dict[str, list[str]],
    metric: str = "val/loss",
    above: str | None = None,
    log: bool = False,
) -> "Figure":
    """A metric over what the model takes on disk after steps of `post`: one line for each curve,
    mean over seeds, band from the lowest to the highest.

    Args:
        table: the runs.
        curves: places by name, as for `study.analyses.compression`.
        metric: as evaluation names it.
        above: a place; what is drawn is the metric minus that of the same seed there.
        log: whether the metric's axis is logarithmic.
    """
    drawn = figure(8, 4.5)
    axes = drawn.add_subplot()
    base = compression.at(table, above, metric) if above else {}
    for number, (name, places) in enumerate(curves.items()):
        rows = compression.curve(table, places, metric).items()
        columns = zip(*([(x, y - base.get(seed, 0)) for x, y in row] for seed, row in rows))
        values: dict[float, list[float]] = {}
        for sizes, losses in (zip(*points) for points in columns):
            values.setdefault(sum(sizes) / len(sizes), []).extend(losses)
        spread(axes, values, COLOURS[number % len(COLOURS)], marker="o", ms=4, label=name)
    axes.set_xscale("log")
    if log:
        axes.set_yscale("log")
    _finish(axes, "bytes on disk", f"{metric} above that of {above}" if above else metric)
    return drawn


def _finish(axes: Any, x: str, y: str) -> None:
    """Name the axes and what is drawn on them."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
