"""Whether the best value of a hyperparameter of a narrow model is that of a wide one."""

import math
from typing import TYPE_CHECKING

from study.analyses import BySeed, Table, setting
from study.plots import COLOURS, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def best(table: Table, *, narrow: str, wide: str, key: str, metric: str = "val/loss") -> BySeed:
    """The values of a key at which two models have their lowest loss. Runs that diverged count as
    infinitely bad.

    Args:
        table: the runs, of arms `NARROW_...` and `WIDE_...` which differ in the key's value.
        narrow, wide: what the arms begin with.
        key: of the configuration, as `optimizer.lr`.
        metric: lower is better.

    Returns:
        By seed: `shift`, between how many places of the grid the two best values are; `lost`, the
        wide model's loss at the narrow one's best value less that at its own.

    Raises:
        ValueError: for a seed without runs of one of them, or on another grid.
    """
    found: BySeed = {"shift": {}, "lost": {}}
    for seed in dict.fromkeys(run["seed"] for run in table):
        own = [run for run in table if run["seed"] == seed]
        small, large = (_losses(own, name, key, metric) for name in (narrow, wide))
        if not small or small.keys() != large.keys():
            raise ValueError(f"wide: seed {seed} has not the same {key} as of '{narrow}'")
        grid = sorted(small)
        first, second = min(grid, key=small.__getitem__), min(grid, key=large.__getitem__)
        found["shift"][seed] = float(abs(grid.index(first) - grid.index(second)))
        found["lost"][seed] = large[first] - large[second]
    return found


def basins(table: Table, *, key: str, metric: str = "val/loss") -> "Figure":
    """Mean loss over seeds against the key's value, a line for what arms begin with.

    Args:
        table, key, metric: as for `best`.
    """
    drawn = figure(5, 4)
    axes = drawn.subplots()
    seeds = dict.fromkeys(run["seed"] for run in table)
    families = dict.fromkeys(run["arm"].rsplit("_", 1)[0] for run in table)
    for colour, name in zip(COLOURS, families):
        every = [_losses([r for r in table if r["seed"] == s], name, key, metric) for s in seeds]
        grid = sorted(every[0])
        means = [sum(losses[value] for losses in every) / len(every) for value in grid]
        axes.plot(grid, means, "o-", color=colour, label=name)
        at = min(range(len(grid)), key=means.__getitem__)
        axes.plot(grid[at], means[at], "*", ms=14, color=colour)
        axes.set_xscale("log")
        axes.set_xticks(grid, [f"{value:g}" for value in grid])
    axes.minorticks_off()
    axes.set_xlabel(key)
    axes.set_ylabel(metric)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _losses(runs: Table, name: str, key: str, metric: str) -> dict[float, float]:
    """Loss by the key's value."""
    losses = {}
    for run in runs:
        if run["arm"].rsplit("_", 1)[0] != name or not run["metrics"]:
            continue
        diverged = run["metrics"].get("diverged")
        losses[float(setting(run, key))] = math.inf if diverged else float(run["metrics"][metric])
    return losses
