"""How good a method's trade-off of several metrics is, and its worst moment."""

import math
from typing import Any

from study.analyses import BySeed, Table, by_arm


def hypervolume(
    table: Table, *, metrics: list[str], groups: dict[str, list[str]], log: list[str] | None = None
) -> BySeed:
    """By group of arms and by seed, the area that the group's arms dominate of two metrics whose
    smaller values are better, each scaled so that the seed's best run of all has 0 and its worst 1:
    1 for a group with an arm that is best at both, 0 for one whose arms are all worst at one.

    Args:
        table: the runs; one that diverged, or lacks a metric, dominates nothing.
        metrics: two.
        groups: arms by name of the group.
        log: those of the metrics that are compared by their logarithm.

    Raises:
        ValueError: for another number of metrics, or an arm without a finished run.
    """
    if len(metrics) != 2:
        raise ValueError(f"metrics: expected two, got {len(metrics)}")
    first, second = (_by_seed(table, metric, metric in (log or [])) for metric in metrics)
    points = {
        seed: {arm: (x, second[seed][arm]) for arm, x in values.items() if arm in second[seed]}
        for seed, values in first.items()
    }
    found: BySeed = {group: {} for group in groups}
    for seed, places in points.items():
        low, high = ([f(v) for v in zip(*places.values())] for f in (min, max))
        spans = [(h - b) or 1.0 for h, b in zip(high, low)]
        scaled = {
            arm: tuple((v - b) / span for v, b, span in zip(place, low, spans))
            for arm, place in places.items()
        }
        for group, arms in groups.items():
            missing = [arm for arm in arms if arm not in scaled]
            if missing:
                raise ValueError(f"groups.{group}: no finished run of arm '{missing[0]}'")
            found[group][seed] = _area([scaled[arm] for arm in arms])
    return found


def lowest(table: Table, *, metric: str) -> BySeed:
    """By arm and seed, the lowest value of a metric that a run has recorded."""

    def least(run: dict[str, Any]) -> float | None:
        return min((line[metric] for line in run["lines"] if metric in line), default=None)

    return by_arm(table, least)


def _by_seed(table: Table, metric: str, log: bool) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for arm, values in by_arm(table, lambda run: run["metrics"].get(metric)).items():
        for seed, value in values.items():
            found.setdefault(seed, {})[arm] = math.log(value) if log else value
    return found


def _area(points: list[tuple[float, ...]]) -> float:
    """Of the unit square's part that is above and to the right of some point."""
    area, ceiling = 0.0, 1.0
    for x, y in sorted(points):
        if y < ceiling:
            area += (1 - x) * (ceiling - y)
            ceiling = y
    return area
