"""How training is best split between full precision and quantisation."""

import math

import numpy as np

from study.analyses import BySeed, Table, by_arm


def best_fraction(
    table: Table, *, budgets: dict[str, dict[float, str]], metric: str = "val/loss"
) -> BySeed:
    """By budget and seed the fraction of training whose arm has the lowest `metric`: where the
    parabola through the best arm and its neighbours, over log fraction, is least, or the best arm's
    own fraction at an end.

    Args:
        table: the runs.
        budgets: by name the arms by their fraction, at least three of each.
        metric: smaller is better.

    Raises:
        ValueError: for fewer than three arms, fractions that are not positive, or an arm without a
            finished run.
    """
    values = by_arm(table, lambda run: run["metrics"].get(metric))
    found: BySeed = {}
    for name, arms in budgets.items():
        if len(arms) < 3 or min(arms) <= 0:
            raise ValueError(f"budgets.{name}: needs arms of at least three positive fractions")
        for arm in arms.values():
            if arm not in values:
                raise ValueError(f"budgets.{name}: no finished run of arm '{arm}'")
        seeds = set.intersection(*(set(values[arm]) for arm in arms.values()))
        found[name] = {
            seed: least({f: values[arm][seed] for f, arm in arms.items()}) for seed in sorted(seeds)
        }
    return found


def least(points: dict[float, float]) -> float:
    """Where values by positive place are least, between places by a parabola over their logs."""
    places = sorted(points)
    best = min(range(len(places)), key=lambda i: points[places[i]])
    if best in (0, len(places) - 1):
        return places[best]
    near = places[best - 1 : best + 2]
    a, b, _ = np.polyfit(np.log(near), [points[place] for place in near], 2)
    return math.exp(-b / (2 * a)) if a > 0 else places[best]
