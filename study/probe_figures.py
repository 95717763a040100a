"""What probes keep in `probes/` of a run's folder, as figures: of a run's own folder and, as
functions of the table of runs, of a recipe's report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from study.analyses import Table, large_batch
from study.plots import COLOURS, INK, figure, points, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Surface = tuple[np.ndarray, np.ndarray]
"""An axis (points,), and losses (draws, points[, points]) over it."""
Arrays = Mapping[str, np.ndarray]

STEEP = 30.0
"""Losses are drawn on a logarithmic scale where they range over more than this factor."""


def landscape(table: Table, *, arms: list[str] | None = None, name: str = "landscape") -> "Figure":
    """The landscapes of `techniques.callback.filter_normalized_landscape`, of every arm: lines as a
    mean over seeds and draws with a band from the lowest to the highest, planes of the first seed.

    Args:
        arms: those drawn, in this order; default: all.

    Raises:
        ValueError: for arms none of whose runs has one.
    """
    found = _kept(table, name, arms, lambda a: (a["axis"], a["losses"]))
    return landscapes(found)


def spectrum(table: Table, *, arms: list[str] | None = None, name: str = "spectrum") -> "Figure":
    """The densities of `study.probes.spectrum`, of every arm's first seed. Arguments as of
    `landscape`."""
    found = _kept(table, name, arms, lambda a: (a["grid"], a["density"]))
    return spectra({arm: runs[:1] for arm, runs in found.items()})


def connectivity(
    table: Table, *, arms: list[str] | None = None, name: str = "connectivity"
) -> "Figure":
    """The lines of `study.probes.connectivity`, of every arm: mean over seeds, band from the lowest
    to the highest. Arguments as of `landscape`."""
    return lines(_kept(table, name, arms, lambda a: a))


def noise_scale(table: Table) -> "Figure":
    """Of runs of several batch sizes: the steps and samples each took to its goal, with the
    hyperbola fitted to all seeds (`study.analyses.large_batch`), and the noise scale over steps,
    geometric mean over seeds, beside the critical batch size of that fit.

    Raises:
        ValueError: for fewer than three runs that reached their goal.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    arrived = [run for run in table if large_batch.arrived(run)]
    if len(arrived) < 3:
        raise ValueError("a fit needs three runs that reached their goal")
    batches = np.array([run["config"]["trainer"]["batch_size"] for run in arrived], dtype=float)
    steps = np.array([run["metrics"]["step"] for run in arrived], dtype=float)
    s_min, e_min = large_batch.solve(batches, steps)
    drawn = figure(10, 4)
    front, scale = drawn.subplots(1, 2)
    for number, batch in enumerate(sorted(set(batches))):
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)]}
        own_steps = steps[batches == batch]
        front.plot(own_steps, own_steps * batch, "o", ms=4, label=f"{batch:g}", **style)
        rows: dict[int, list[float]] = {}
        for run in table:
            if run["config"]["trainer"]["batch_size"] == batch:
                for step, value in zip(*points(run["lines"], "probe/noise_scale")):
                    rows.setdefault(step, []).append(value)
        means = [float(np.exp(np.mean(np.log(rows[step])))) for step in sorted(rows)]
        scale.plot(sorted(rows), means, lw=1.2, **style)
    curve = s_min * (1 + np.geomspace(0.02, 50, 200))
    front.plot(curve, e_min / (1 - s_min / curve), color=INK, lw=1, ls=":", label="fit")
    scale.axhline(e_min / s_min, color=INK, lw=1, ls=":", label="critical batch size of the fit")
    front.set_xlim(0.7 * steps.min(), 1.4 * steps.max())
    samples = steps * batches
    front.set_ylim(0.7 * samples.min(), 1.4 * samples.max())
    front.set_xscale("log")
    front.legend(frameon=False, fontsize=8, title="batch size", title_fontsize=8)
    scale.legend(frameon=False, fontsize=8)
    for axes, x, y in (
        (front, "steps to the goal", "samples to it"),
        (scale, "step", "noise scale"),
    ):
        axes.set_yscale("log")
        for line in (axes.yaxis, axes.xaxis) if axes is front else (axes.yaxis,):
            line.set_major_locator(LogLocator(subs=(1, 2, 5)))
            line.set_major_formatter("{x:g}")
            line.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.25)
    return drawn


def layers_over_steps(table: Table, *, metric: str) -> "Figure":
    """The mean of `<metric>/<layer>` over layers at each step: each arm's mean over seeds, with a
    band from the lowest to the highest."""
    drawn = figure(8, 4)
    axes = drawn.add_subplot()
    for number, arm in enumerate(dict.fromkeys(run["arm"] for run in table)):
        values: dict[int, list[float]] = {}
        for run in table:
            for line in run["lines"] if run["arm"] == arm else ():
                layers = [
                    v for k, v in line.items() if k.startswith(f"{metric}/") and v is not None
                ]
                if layers:
                    values.setdefault(line["step"], []).append(sum(layers) / len(layers))
        spread(axes, values, COLOURS[number % len(COLOURS)], label=arm)
    _finish(axes, "step", f"{metric}, mean over layers")
    return drawn


def own(table: Table) -> list[tuple[str, "Figure"]]:
    """Captions and figures of all that runs without a recipe have kept."""
    makers = {
        "Loss landscape": landscape,
        "Spectrum of the Hessian": spectrum,
        "Loss between two runs": connectivity,
    }
    found = []
    for caption, make in makers.items():
        try:
            found.append((caption, make(table)))
        except ValueError:  # none has kept it
            continue
    return found


def landscapes(runs: Mapping[str, Sequence[Surface]]) -> "Figure":
    """Lines of several labels in one panel, or a plane of each."""
    first = next(iter(runs.values()))[0][1]
    return _planes(runs) if first.ndim == 3 else _lines(runs)


def _lines(runs: Mapping[str, Sequence[Surface]]) -> "Figure":
    drawn = figure(8, 4)
    axes = drawn.add_subplot()
    for number, (label, surfaces) in enumerate(runs.items()):
        rows = np.concatenate([losses for _, losses in surfaces])
        colour, width = COLOURS[number % len(COLOURS)], 1.5 + 0.8 * min(len(runs) - 1 - number, 6)
        _band(axes, surfaces[0][0], rows, colour, label, lw=width)  # equal lines would hide others
    _finish(axes, "distance along a random direction", "loss")
    return drawn


def _planes(runs: Mapping[str, Sequence[Surface]]) -> "Figure":
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import LogLocator, MaxNLocator

    planes = {label: (axis, losses[0]) for label, ((axis, losses), *_) in runs.items()}
    finite = np.concatenate([p[np.isfinite(p)] for _, p in planes.values()])
    low, high = float(finite.min()), float(finite.max())
    steep = low > 0 and high > STEEP * low
    if steep:
        levels, norm = np.geomspace(low, high, 25), LogNorm(low, high)
    else:
        levels, norm = np.linspace(low, high, 25), Normalize(low, high)
    columns = min(len(planes), 3)
    rows = -(-len(planes) // columns)
    drawn = figure(3.2 * columns + 1, 3.2 * rows)
    panels = drawn.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    image: Any = None
    for axes, (label, (axis, plane)) in zip(panels, planes.items()):
        image = axes.contourf(axis, axis, plane.T, levels=levels, norm=norm, cmap="viridis")
        axes.contour(axis, axis, plane.T, levels=levels[::3], colors="white", linewidths=0.5)
        axes.plot(0, 0, "+", color="white", ms=9)
        axes.set_title(label, fontsize=9)
        axes.set_aspect("equal")
    for axes in panels[len(planes) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("along the second")
    for axes in panels[max(0, len(planes) - columns) : len(planes)]:
        axes.set_xlabel("along one direction")
        axes.tick_params(labelbottom=True)
    ticks = LogLocator(subs=(1, 2, 5)) if steep else MaxNLocator(6)
    drawn.colorbar(image, ax=list(panels), label="loss", ticks=ticks, format="%g")
    return drawn


def spectra(runs: Mapping[str, Sequence[Surface]]) -> "Figure":
    """Densities over eigenvalues, a panel each below one another, on one scale."""
    drawn = figure(8, 1.2 + 1.5 * len(runs))
    panels = drawn.subplots(len(runs), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for number, (axes, (label, ((grid, density), *_))) in enumerate(zip(panels, runs.items())):
        colour = COLOURS[number % len(COLOURS)]
        axes.fill_between(grid, 1e-7, density + 1e-7, color=colour, alpha=0.3, lw=0)
        axes.plot(grid, density + 1e-7, color=colour, lw=0.8)
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-6)
        axes.set_title(label, fontsize=9, loc="left")
        axes.grid(alpha=0.25)
        axes.set_ylabel("density")
    panels[-1].set_xlabel("eigenvalue of the Hessian")
    return drawn


def lines(runs: Mapping[str, Sequence[Arrays]]) -> "Figure":
    """Losses from one run's weights to another's, and beside them to the other's with its units in
    the nearest order, where that is known."""
    titles = {"losses": "", "aligned_losses": "with units in the nearest order"}
    keys = [key for key in titles if any(key in line for own in runs.values() for line in own)]
    drawn = figure(8 if len(keys) == 1 else 11, 4)
    panels = drawn.subplots(1, len(keys), squeeze=False, sharey=True)[0]
    for axes, key in zip(panels, keys):
        for number, (label, own) in enumerate(runs.items()):
            rows = np.array([line[key] for line in own if key in line])
            if len(rows):
                at = np.linspace(0, 1, rows.shape[1])
                _band(axes, at, rows, COLOURS[number % len(COLOURS)], label)
        axes.set_title(titles[key], fontsize=9)
        _finish(axes, "from the run's weights (0) to the other run's (1)", "")
    panels[0].set_ylabel("loss")
    return drawn


def _band(
    axes: "Axes", at: np.ndarray, rows: np.ndarray, colour: str, label: str, **style: Any
) -> None:
    """The mean of rows, from the lowest to the highest in a band."""
    axes.plot(at, rows.mean(0), color=colour, label=label, **style)
    if len(rows) > 1:
        axes.fill_between(at, rows.min(0), rows.max(0), color=colour, alpha=0.15, lw=0)


def _finish(axes: "Axes", x: str, y: str) -> None:
    values = np.concatenate([line.get_ydata() for line in axes.lines])  # type: ignore[arg-type]
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > STEEP * values.min():
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _kept(
    table: Table, name: str, arms: list[str] | None, take: Callable[[Any], Any]
) -> dict[str, list[Any]]:
    """What the runs of each arm have in `probes/<name>.npz`."""
    from study.probes.moving import kept

    found: dict[str, list[Any]] = {}
    for arm in arms or list(dict.fromkeys(run["arm"] for run in table)):
        folders = [Path(run["run_dir"]) for run in table if run["arm"] == arm and run["run_dir"]]
        arrays = [a for folder in folders if (a := kept(folder, name)) is not None]
        if arrays:
            found[arm] = [take(a) for a in arrays]
    if not found:
        raise ValueError(f"no run of these arms has probes/{name}.npz")
    return found
