"""Averages of the weights of several lengths."""

import re
from statistics import fmean
from typing import Any

from study.analyses import BySeed, Table


def chosen(table: Table, *, arm: str, metric: str = "val/loss", direction: str = "lower") -> BySeed:
    """The `metric` that each seed's run has with the length of average that is best, by its mean,
    for the other seeds, which a choice on the same seed would flatter (`value`), and that length
    (`length`), from `post/posthoc_ema/<σ>/<metric>`.

    Args:
        table: the runs.
        arm: whose.
        metric: what is compared.
        direction: which values are good; lower or higher.

    Raises:
        ValueError: for another direction, or fewer than two finished runs with the values.
    """
    if direction not in ("lower", "higher"):
        raise ValueError(f"direction: expected lower or higher, got {direction!r}")
    sign = 1 if direction == "lower" else -1
    curves = {run["seed"]: _lengths(run, metric) for run in table if run["arm"] == arm}
    curves = {seed: values for seed, values in curves.items() if values}
    if len(curves) < 2:
        raise ValueError(f"arm: fewer than two runs of '{arm}' have post/posthoc_ema/<σ>/{metric}")
    found: BySeed = {"value": {}, "length": {}}
    for seed, own in curves.items():
        others = [values for other, values in curves.items() if other != seed]
        means = {sigma: sign * fmean(values[sigma] for values in others) for sigma in own}
        best = min(means, key=lambda sigma: means[sigma])
        found["value"][seed], found["length"][seed] = own[best], best
    return found


def _lengths(run: dict[str, Any], metric: str) -> dict[float, float]:
    name = re.compile(rf"post/posthoc_ema/([\d.e-]+)/{re.escape(metric)}")
    found = {name.fullmatch(key): value for key, value in run["metrics"].items()}
    return {float(match[1]): value for match, value in found.items() if match}
