"""Pictures of how far probabilities, and what is made of them, can be trusted."""

from typing import TYPE_CHECKING, Any

import numpy as np

from study.analyses import Table
from study.analyses.merging import restored
from study.plots import COLOURS, INK, figure, spread
from techniques.post.held_out import halves, said

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reliability(table: Table, *, arms: dict[str, str], bins: int = 10) -> "Figure":
    """Accuracy by confidence before and after temperature scaling, over the samples that the
    temperature was not fitted to, of all seeds together: bars, and the diagonal that they should
    reach; below, how many samples have that confidence.

    Args:
        table: the runs; the step is `post.temperature`.
        arms: those drawn, by what they are called.
        bins: of confidence.

    Raises:
        ValueError: for an arm without such a run.
    """
    panels = {}
    for name, arm in arms.items():
        rows = [row for row in table if row["arm"] == arm and TEMPERATURE in row["metrics"]]
        if not rows:
            raise ValueError(f"arms: no finished run of '{arm}' has post.temperature")
        pairs = [_confidences(row) for row in rows]
        panels[name] = np.concatenate([before for before, _ in pairs], 1)
        panels[f"{name}, T fitted"] = np.concatenate([after for _, after in pairs], 1)
    drawn = figure(2.9 * len(panels), 4.2)
    grid = drawn.subplots(2, len(panels), squeeze=False, height_ratios=[3, 1], sharex=True)
    edges = np.linspace(0, 1, bins + 1)
    for number, (name, (confidence, correct)) in enumerate(panels.items()):
        colour, (bars, counts) = COLOURS[number // 2], grid[:, number]
        places = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, bins - 1)
        sizes = np.bincount(places, minlength=bins)
        right = np.bincount(places, correct, bins) / np.maximum(sizes, 1)
        bars.bar(edges[:-1], right, 1 / bins, align="edge", color=colour, ec="white")
        bars.plot([0, 1], [0, 1], ":", color=INK, lw=1)
        bars.set_ylim(0, 1)
        bars.set_title(name, fontsize=9)
        counts.bar(
            edges[:-1], sizes / sizes.sum(), 1 / bins, align="edge", color=colour, ec="white"
        )
        counts.set_ylim(0, 1)
        counts.set_xlabel("confidence")
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("share")
    return drawn


TEMPERATURE = "post/temperature/t"


def _confidences(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and correctness (2, samples), before and after the temperature."""
    run = restored(row)  # whose checkpoint is from before the step
    step = run.post["temperature"]
    logits, labels = said(run, halves(run, step.share, step.seed)[1])
    parts = []
    for scaled in (logits, logits / row["metrics"][TEMPERATURE]):
        confidence, predicted = scaled.softmax(-1).max(-1)
        parts.append(np.stack([confidence.numpy(), (predicted == labels).double().numpy()]))
    return parts[0], parts[1]


def risks(table: Table, *, alpha: float) -> "Figure":
    """Risk and set size that `post.conformal_risk_control` records, over the number of calibration
    samples: one line for each family of arms (the name before its last `_`), and dashed without the
    correction; mean over seeds, band from the lowest to the highest.

    Args:
        table: the runs.
        alpha: the risk asked for, a dotted line.

    Raises:
        ValueError: for runs without the step.
    """
    prefix = "post/conformal_risk_control/"
    families: dict[str, list[dict[str, float]]] = {}
    for run in table:
        found = {k.removeprefix(prefix): v for k, v in run["metrics"].items() if prefix in k}
        if "risk" in found:
            family = run["arm"].rpartition("_")[0] or run["arm"]
            families.setdefault(family, []).append(found)
    if not families:
        raise ValueError("the runs have no post.conformal_risk_control")
    drawn = figure(10, 4)
    for axes, key in zip(drawn.subplots(1, 2), ("risk", "size")):
        for colour, (family, rows) in zip(COLOURS, families.items()):
            for name, dashes, label in ((key, "-", ""), (f"naive_{key}", "--", ", uncorrected")):
                values: dict[float, list[float]] = {}
                for row in rows:
                    values.setdefault(row["samples"], []).append(row[name])
                style = {"ls": dashes, "marker": "o", "ms": 4, "label": family + label}
                spread(axes, values, colour, **style)
        axes.set_xlabel("calibration samples")
        axes.set_ylabel(f"{key} on the rest" if key == "risk" else "classes in a set")
        axes.grid(alpha=0.25)
        if key == "risk":
            axes.axhline(alpha, color=INK, lw=1, ls=":")
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.set_yscale("log")
    return drawn


def predicted(table: Table, *, ways: dict[str, str]) -> "Figure":
    """Accuracies on shifted data as `post.atc_accuracy_prediction` predicts them over what they
    are, one panel for each way: a dot for each run and shift, a colour for each arm.

    Args:
        table: the runs.
        ways: names of predictions, by what they are called.

    Raises:
        ValueError: for runs without the step.
    """
    prefix, end = "post/atc_accuracy_prediction/", "/accuracy"
    drawn = figure(2.7 * len(ways), 3.2)
    panels = drawn.subplots(1, len(ways), squeeze=False, sharex=True, sharey=True)[0]
    arms = list(dict.fromkeys(run["arm"] for run in table))
    points: list[float] = []
    for axes, (name, way) in zip(panels, ways.items()):
        for colour, arm in zip(COLOURS, arms):
            rows = [run["metrics"] for run in table if run["arm"] == arm]
            pairs = [
                (row[key.removesuffix(f"/{way}") + end], value)
                for row in rows
                for key, value in row.items()
                if key.startswith(prefix) and key.endswith(f"/{way}") and "/error/" not in key
            ]
            axes.plot(*zip(*pairs), "o", ms=3, alpha=0.6, mew=0, color=colour, label=arm)
            points += [value for pair in pairs for value in pair]
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("accuracy")
        axes.grid(alpha=0.25)
    if not points:
        raise ValueError("the runs have no post.atc_accuracy_prediction")
    ends = [min(points), max(points)]
    for axes in panels:
        axes.plot(ends, ends, ":", color=INK, lw=1)
    panels[0].set_ylabel("predicted")
    panels[0].legend(frameon=False, fontsize=8)
    return drawn
