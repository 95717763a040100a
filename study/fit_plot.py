"""A fitted law as a picture."""

from typing import TYPE_CHECKING

import numpy as np

from study.fitting import Fit
from study.plots import COLOURS, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 3
"""Side by side; more go below."""


def draw(result: Fit, columns: dict[str, np.ndarray]) -> "Figure":
    """Measured against predicted loss, and what is left over in percent against each column; rows
    that were held out are of the other colour."""
    used = {name: columns[name] for name in result.law.columns}
    across, rows = min(1 + len(used), PANELS), -(-(1 + len(used)) // PANELS)
    drawn = figure(4.2 * across, 4 * rows)
    first, *others = drawn.subplots(rows, across, squeeze=False).flat
    for axes in others[len(used) :]:
        axes.set_visible(False)
    _scatter(first, result, result.predicted, result.measured)
    ends = [min(result.measured.min(), result.predicted.min()), result.measured.max()]
    first.plot(ends, ends, color=COLOURS[6], lw=1, zorder=0)
    first.set_xlabel("predicted loss")
    first.set_ylabel("measured loss")
    left = 100 * (result.measured / result.predicted - 1)
    for axes, (name, values) in zip(others, used.items()):
        _scatter(axes, result, values, left)
        axes.axhline(0, color=COLOURS[6], lw=1, zorder=0)
        if (values > 0).all() and values.max() > 30 * values.min():
            axes.set_xscale("log")
        else:
            axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(name.replace("_", " "))
        axes.set_ylabel("measured over predicted, −1 (%)")
    for axes in (first, *others[: len(used)]):
        axes.spines[["top", "right"]].set_visible(False)
    if result.held_out.any():
        first.legend(frameon=False)
    return drawn


def _scatter(axes: "Axes", result: Fit, x: np.ndarray, y: np.ndarray) -> None:
    for mask, label, colour in (
        (~result.held_out, "fitted", COLOURS[0]),
        (result.held_out, "held out", COLOURS[1]),
    ):
        axes.scatter(x[mask], y[mask], s=14, color=colour, label=label)
