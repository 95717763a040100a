"""What losses over learning rates and weight decays say."""

import math
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from study.analyses import BySeed, Table
from study.plots import COLOURS, band, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = 1e-6
"""Relative; within it two products of learning rate and weight decay are the same."""


def sensitivity(table: Table, *, untrained: str, metric: str = "val/loss") -> BySeed:
    """By family of arms and by seed, the mean over learning rates η of min(ℓ(η), ℓ₀) − ℓ*, with ℓ₀
    the loss before training and ℓ* the family's lowest.

    Arms belong to the family before their last `_`, as `plain` of `plain_a`. A run that diverged
    counts as ℓ₀.

    Args:
        untrained: arm whose loss is ℓ₀.

    Raises:
        ValueError: for a seed without an untrained run, or a family with another number of learning
            rates than others.

    Source: "Small-scale proxies for large-scale Transformer training instabilities", arXiv
    2309.14322, §2.2.
    """
    start = {run["seed"]: run["metrics"][metric] for run in table if run["arm"] == untrained}
    losses: dict[str, dict[int, list[float]]] = {}
    for run in table:
        if run["arm"] == untrained or not run["metrics"]:
            continue
        if run["seed"] not in start:
            raise ValueError(f"untrained: '{untrained}' has no run of seed {run['seed']}")
        worst = start[run["seed"]]
        value = worst if run["metrics"]["diverged"] else run["metrics"].get(metric, worst)
        family = losses.setdefault(run["arm"].rpartition("_")[0], {})
        family.setdefault(run["seed"], []).append(min(value, worst))
    counts = {len(values) for family in losses.values() for values in family.values()}
    if len(counts) > 1:
        raise ValueError(f"families have different numbers of learning rates: {sorted(counts)}")
    return {
        family: {seed: float(np.mean(values) - min(values)) for seed, values in seeds.items()}
        for family, seeds in losses.items()
    }


def trajectories(
    table: Table, *, metric: str, early: tuple[float, float], late: tuple[float, float]
) -> BySeed:
    """How far curves are apart, by what their arms have in common: `lr_early`, `lr_late` (the
    learning rate η) and `elr_early`, `elr_late` (the effective learning rate η·λ, λ the weight
    decay), the mean of |log mᵢ − log mⱼ| over pairs of arms and the steps of the window.

    Pairs have the same seed, and so the same start and batches.

    Args:
        metric: positive, of the lines.
        early, late: first and last step of the windows.

    Raises:
        ValueError: when no two arms have a learning rate, or an effective one, in common, or the
            runs lack the metric in a window.

    Source: "Efficient Hyperparameter Tuning via Trajectory Invariance Principle", arXiv 2509.25049.
    """
    windows = {"early": early, "late": late}
    found: BySeed = {f"{kind}_{name}": {} for kind in ("lr", "elr") for name in windows}
    for seed in dict.fromkeys(run["seed"] for run in table):
        runs = [run for run in table if run["seed"] == seed and run["metrics"]]
        for kind in ("lr", "elr"):
            pairs = [pair for pair in combinations(runs, 2) if common(*pair) == kind]
            if not pairs:
                raise ValueError(f"no two arms have the same {kind}")
            for name, window in windows.items():
                gaps = [_gap(*pair, metric, window) for pair in pairs]
                found[f"{kind}_{name}"][seed] = float(np.mean(gaps))
    return found


def common(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """What two runs have in common, `lr` or `elr`; None for neither, or both."""
    (a, x), (b, y) = (_rates(run) for run in (first, second))
    same = {
        "lr": math.isclose(a, b, rel_tol=TOLERANCE),
        "elr": math.isclose(a * x, b * y, rel_tol=TOLERANCE),
    }
    held = [name for name, value in same.items() if value]
    return held[0] if len(held) == 1 else None


def curves(table: Table, *, metrics: list[str], lr: list[str], elr: list[str]) -> "Figure":
    """Metrics over steps, a row each: on the left arms with one learning rate, on the right arms
    with one effective learning rate; mean over seeds, band from the lowest to the highest.

    Args:
        lr, elr: names of the arms.
    """
    drawn = figure(10, 3.2 * len(metrics))
    panels = drawn.subplots(len(metrics), 2, squeeze=False, sharex=True, sharey="row")
    titles = ("the same learning rate", "the same learning rate times weight decay")
    for row, metric in zip(panels, metrics):
        for axes, arms, title in zip(row, (lr, elr), titles):
            for number, arm in enumerate(arms):
                runs = [run for run in table if run["arm"] == arm]
                eta, decay = _rates(runs[0])
                label = f"lr {eta:g}, decay {decay:g}"
                lines = [run["lines"] for run in runs]
                band(axes, lines, metric, COLOURS[number % len(COLOURS)], label=label)
            axes.set_yscale("log")
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("step")
            axes.grid(alpha=0.25, which="both")
            axes.legend(frameon=False, fontsize=8)
        row[0].set_ylabel(metric)
    return drawn


def _rates(run: dict[str, Any]) -> tuple[float, float]:
    optimizer = run["config"]["optimizer"]
    return float(optimizer["lr"]), float(optimizer["weight_decay"])


def _gap(
    first: dict[str, Any], second: dict[str, Any], metric: str, window: tuple[float, float]
) -> float:
    one, other = (
        {line["step"]: line[metric] for line in run["lines"] if metric in line}
        for run in (first, second)
    )
    steps = [s for s in one.keys() & other.keys() if window[0] <= s <= window[1]]
    if not steps:
        raise ValueError(f"metric: no '{metric}' between steps {window[0]:g} and {window[1]:g}")
    return float(np.mean([abs(math.log(one[s] / other[s])) for s in steps]))
