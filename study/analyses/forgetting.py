"""What fine-tuned models have learned and what they have lost."""

import numpy as np

from study.analyses import BySeed, Table


def learned(table: Table, *, before: str, most: str, metric: str = "val/loss") -> BySeed:
    """By arm and seed, the change of a metric since the arm `before` as a share of that of the arm
    `most`: 1 is as much as this one learned.

    Args:
        table: the runs.
        before: arm of what all started from, on the same task.
        most: arm that the others are compared with.
        metric: in the runs' last metrics.

    Raises:
        ValueError: for an arm without a finished run that has the metric.
    """
    values = _values(table, metric)
    for name in (before, most):
        if name not in values:
            raise ValueError(f"no finished run of the arm '{name}' has '{metric}'")
    found: BySeed = {}
    for arm, seeds in values.items():
        common = seeds.keys() & values[before].keys() & values[most].keys()
        found[arm] = {
            seed: (seeds[seed] - values[before][seed]) / (values[most][seed] - values[before][seed])
            for seed in sorted(common)
        }
    return found


def together(table: Table, *, arms: list[str], first: str, second: str) -> BySeed:
    """By seed, as `r` Pearson's correlation of two metrics over some arms and all their
    evaluations.

    Args:
        table: the runs.
        arms: at least two.
        first, second: metrics that are on the same lines of `metrics.jsonl`.

    Raises:
        ValueError: when no seed has two different values of each.
    """
    points: dict[int, list[tuple[float, float]]] = {}
    for run in table:
        if run["arm"] in arms:
            both = [(x[first], x[second]) for x in run["lines"] if {first, second} <= x.keys()]
            points.setdefault(run["seed"], []).extend(both)
    varied = {s: np.array(p).T for s, p in points.items() if len(p) > 1}
    varied = {s: p for s, p in varied.items() if np.ptp(p, axis=1).all()}
    if not varied:
        raise ValueError(f"no seed has two values of '{first}' and '{second}'")
    return {"r": {seed: float(np.corrcoef(*p)[0, 1]) for seed, p in varied.items()}}


def _values(table: Table, metric: str) -> BySeed:
    found: BySeed = {}
    for run in table:
        if metric in run["metrics"]:
            found.setdefault(run["arm"], {})[run["seed"]] = run["metrics"][metric]
    return found
