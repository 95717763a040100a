"""What the curves of runs say."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from study.analyses import BySeed, Table, by_arm

Lines = list[dict[str, Any]]


def steps_to(table: Table, *, metric: str, value: float, direction: str = "higher") -> BySeed:
    """By arm and seed, the first recorded step at which `metric` is at least `value` (at most, when
    `direction` is `"lower"`).

    A run that never gets there counts with its last step allowed (`trainer.max_steps`), which makes
    it look faster than it is.

    Raises:
        ValueError: for another direction, or a metric no run has.
    """
    if direction not in ("higher", "lower"):
        raise ValueError(f"direction: expected higher or lower, got {direction!r}")
    _check(table, metric)
    sign = 1 if direction == "higher" else -1

    def first(run: dict[str, Any]) -> float:
        worst = -sign * math.inf
        there = (r["step"] for r in run["lines"] if sign * r.get(metric, worst) >= sign * value)
        return next(there, run["config"]["trainer"]["max_steps"])

    return by_arm(table, first)


def gap(table: Table, *, first: dict[str, Any], second: dict[str, Any]) -> BySeed:
    """By arm and seed, the steps from one event to another, such as from a fitted training set to
    generalisation, the gap of grokking.

    Args:
        first, second: the events, as arguments of `steps_to`, whose cut-off holds for both.
    """
    early, late = steps_to(table, **first), steps_to(table, **second)
    return {arm: {s: late[arm][s] - early[arm][s] for s in early[arm]} for arm in early}


def lead(table: Table, *, fall: float = 0.5, jump: float = 10.0, window: int = 50) -> BySeed:
    """How early two alarms go off before a loss explodes: by key `alignment` and `gradient_norm`
    and by seed, the steps from the first alarm to the explosion, 0 without one.

    The loss has exploded when the run diverged or `train/loss` is over twice its lowest value
    before. Spectral alignment's alarm is a mean of `probe/sign_diversity/<layer>` over layers below
    `fall` times its largest value before; the gradient norm's is one over `jump` times the median
    of those before. A first alarm more than `window` steps before the explosion is a false one, and
    the run's lead is 0. Runs that did not explode do not count; of several arms it is the mean.
    """
    found: dict[str, dict[int, list[float]]] = {"alignment": {}, "gradient_norm": {}}
    for run in table:
        end = _explosion(run)
        if end is None:
            continue
        before = [line for line in run["lines"] if line["step"] < end]
        alarms = {"alignment": _falls(before, fall), "gradient_norm": _jumps(before, jump)}
        for name, steps in alarms.items():
            lead = end - next(steps, end)
            found[name].setdefault(run["seed"], []).append(lead if lead <= window else 0)
    return {n: {s: sum(v) / len(v) for s, v in seeds.items()} for n, seeds in found.items()}


def tolerance(table: Table, *, metric: str, within: float) -> BySeed:
    """By family of arms and by seed, the decades of learning rates whose `metric` is at most
    `within` below the family's best.

    Arms belong to the family before their last `_`, as `sgd` of `sgd_a`; their learning rates are
    those of their configurations, evenly spaced in decades. A run that diverged is no good.
    """
    runs: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for run in table:
        family = run["arm"].rpartition("_")[0]
        good = not run["metrics"].get("diverged", 1)
        value = run["metrics"].get(metric, -math.inf) if good else -math.inf
        rates = runs.setdefault(family, {}).setdefault(run["seed"], [])
        rates.append((math.log10(run["config"]["optimizer"]["lr"]), value))
    found: BySeed = {}
    for family, seeds in runs.items():
        for seed, points in seeds.items():
            points.sort()
            spacing = (points[-1][0] - points[0][0]) / max(len(points) - 1, 1)
            best = max(value for _, value in points)
            good = sum(value >= best - within for _, value in points if math.isfinite(value))
            found.setdefault(family, {})[seed] = good * spacing
    return found


def oscillation(table: Table, *, metric: str, best: float = 0.0, after: float = 0.5) -> BySeed:
    """By arm and seed, how much `metric` changes from one record to the next, as a share of how far
    it is from its best: mean |xₖ₊₁ − xₖ| over mean |xₖ − best|. A slow trend hardly counts.

    Args:
        table: the runs.
        metric: an error of any unit.
        best: the value that is no error.
        after: fraction of the steps from which on it is looked at.

    Raises:
        ValueError: for a metric no run has.
    """
    _check(table, metric)

    def swing(run: dict[str, Any]) -> float | None:
        first = after * run["config"]["trainer"]["max_steps"]
        values = [r[metric] for r in run["lines"] if metric in r and r["step"] >= first]
        error = sum(abs(value - best) for value in values) / max(len(values), 1)
        if len(values) < 2 or not error:
            return None
        changes = [abs(late - early) for early, late in pairwise(values)]
        return sum(changes) / len(changes) / error

    return by_arm(table, swing)


def _check(table: Table, metric: str) -> None:
    if not any(metric in line for run in table for line in run["lines"]):
        raise ValueError(f"metric: no run has '{metric}'")


def _explosion(run: dict[str, Any]) -> float | None:
    lowest = math.inf
    for line in run["lines"]:
        loss = line.get("train/loss")
        if loss is None:
            continue
        if not isinstance(loss, float) or not math.isfinite(loss) or loss > 2 * lowest:
            return line["step"]
        lowest = min(lowest, loss)
    diverged = run["metrics"].get("diverged")
    return run["metrics"]["step"] if diverged else None


def _falls(lines: Lines, share: float) -> Iterator[int]:
    """Steps at which the mean sign diversity is below a share of its largest value before."""
    largest = 0.0
    for line in lines:
        layers = [v for k, v in line.items() if k.startswith("probe/sign_diversity/")]
        if not layers:
            continue
        mean = sum(layers) / len(layers)
        if mean < share * largest:
            yield line["step"]
        largest = max(largest, mean)


def _jumps(lines: Lines, times: float) -> Iterator[int]:
    """Steps at which the gradient norm is over so many times the median of those before."""
    seen: list[float] = []
    for line in lines:
        norm = line.get("grad_norm")
        if not isinstance(norm, float):
            continue
        if len(seen) >= 3 and norm > times * sorted(seen)[len(seen) // 2]:
            yield line["step"]
        seen.append(norm)
