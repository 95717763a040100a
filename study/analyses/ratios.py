"""Arms against one another, and over a quantity that their configurations vary."""

import math

import numpy as np

from study.analyses import BySeed, Table, by_arm, setting


def ratio(table: Table, *, metric: str, to: str) -> BySeed:
    """By arm and seed, a metric over that of the arm `to` with the same seed.

    Raises:
        ValueError: when no run of that arm has the metric.
    """
    values = _values(table, metric)
    if to not in values:
        raise ValueError(f"to: no run of '{to}' has '{metric}'")
    base = values.pop(to)
    return {
        arm: {seed: value / base[seed] for seed, value in own.items() if base.get(seed)}
        for arm, own in values.items()
    }


def apart(table: Table, *, metric: str, to: str) -> BySeed:
    """By arm and seed, how far a metric's curve is at most from that of the arm `to` with the same
    seed, over the steps that both record.

    Raises:
        ValueError: when no run of that arm has the metric.
    """
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for run in table:
        curve = {line["step"]: line[metric] for line in run["lines"] if metric in line}
        if run["metrics"] and curve:
            curves.setdefault(run["arm"], {})[run["seed"]] = curve
    if to not in curves:
        raise ValueError(f"to: no run of '{to}' has '{metric}'")
    base = curves.pop(to)
    found: BySeed = {}
    for arm, seeds in curves.items():
        for seed, curve in seeds.items():
            common = curve.keys() & base.get(seed, {}).keys()
            if common:
                worst = max(abs(curve[step] - base[seed][step]) for step in common)
                found.setdefault(arm, {})[seed] = worst
    return found


def exponent(table: Table, *, metric: str, of: str) -> BySeed:
    """By family of arms and seed, the slope of log `metric` over log of a configuration key, by
    least squares. Arms belong to the family before their last `_`, as `plain` of `plain_64`.

    Args:
        of: the key, such as `model.depth`.

    Raises:
        ValueError: when a family has no two values of the key.
    """
    points: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for run in table:
        value = run["metrics"].get(metric)
        if value:
            family = points.setdefault(run["arm"].rpartition("_")[0], {})
            family.setdefault(run["seed"], []).append((math.log(setting(run, of)), math.log(value)))
    found: BySeed = {}
    for family, seeds in points.items():
        for seed, own in seeds.items():
            x, y = np.array(own).T
            if len(set(x)) < 2:
                raise ValueError(f"of: the arms '{family}_…' have one value of {of} only")
            found.setdefault(family, {})[seed] = float(np.polyfit(x, y, 1)[0])
    return found


def _values(table: Table, metric: str) -> BySeed:
    return by_arm(table, lambda run: run["metrics"].get(metric))
