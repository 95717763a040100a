"""Scaling laws fitted to a recipe's runs."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from study import laws
from study.analyses import BySeed, Table, add
from study.fitting import Fit, Objective, fit, shown
from study.laws import Law
from study.points import Columns, Points, from_runs


def fitted(table: Table, **arguments: Any) -> BySeed:
    """A law of `study.laws` fitted to each seed's runs.

    Args:
        table: the runs.
        arguments: those of `by_seed`.

    Returns:
        By seed: the law's exponents and coefficients by their names, with `resamples` each one's
        95% interval as `<name>_low` and `<name>_high`; `fitted_error` and, of the arms held out,
        `error`, means of |predicted − measured| / measured; `nearest`, the latter when the lowest
        fitted loss is the prediction; `r2` of the log losses it was fitted to.
    """
    found: BySeed = {}
    for seed, result, _ in by_seed(table, **arguments):
        add(found, seed, _numbers(result))
    return found


def by_seed(
    table: Table,
    *,
    law: str,
    arms: Sequence[str] = ("*",),
    held_out: Sequence[str] = (),
    metric: str = "val/loss",
    x: str | None = None,
    other: str | None = None,
    embeddings: bool = True,
    resamples: int = 0,
) -> Iterator[tuple[int, Fit, Columns]]:
    """Each seed, its fit and the columns it was fitted to, whose rows are runs, or evaluations of a
    law of the learning rate. Runs that diverged are left out.

    Args:
        table: the runs.
        law: its name.
        arms: those fitted or held out, names or patterns such as `w*_s400`.
        held_out: those of them that are predicted and not fitted.
        metric, x, other: as for `study.points.from_runs`.
        embeddings: whether they count as parameters; if not these are 12 · depth · width², as in
            "Scaling Laws for Neural Language Models", arXiv 2001.08361, equation 2.1.
        resamples: of the bootstrap, in which the rows of a run are drawn together.

    Raises:
        ValueError: for a pattern that no arm has, or a seed with too few runs for the law.
        UsageError: for an unknown law, or a run without the metric.
    """
    rows = points_by_seed(
        table, laws.find(law), arms, held_out, metric, x, other, embeddings=embeddings
    )
    for seed, points, mask in rows:
        try:
            result = fit(
                laws.find(law), points.columns, points.losses, mask, resamples, points.groups
            )
        except ValueError as error:
            raise ValueError(f"seed {seed}: {error}") from error
        yield seed, result, points.columns


def points_by_seed(
    table: Table,
    law: Law,
    arms: Sequence[str],
    held_out: Sequence[str],
    metric: str,
    x: str | None = None,
    other: str | None = None,
    *,
    embeddings: bool = True,
) -> Iterator[tuple[int, Points, np.ndarray]]:
    """Each seed, the rows of a law and which of them are held out; as for `by_seed`."""
    names = dict.fromkeys(run["arm"] for run in table)
    used = matching(names, "arms", arms)
    held = matching(names, "held_out", held_out)
    for seed in dict.fromkeys(run["seed"] for run in table):
        runs = [r for r in table if r["seed"] == seed and r["arm"] in used and _ended(r)]
        if not embeddings:
            runs = [_without_embeddings(run) for run in runs]
        points = from_runs(runs, law, metric, x, other)
        yield seed, points, np.array([runs[n]["arm"] in held for n in points.groups], dtype=bool)


def optimal_size(table: Table, *, arms: Sequence[str] = ("*",), metric: str = "val/loss") -> BySeed:
    """The exponent β of N_opt ∝ C^β: of 64 computes C = 6·N·D, evenly spaced in log C from the
    first to the last at which two sizes were trained, the size with the lowest loss, and the line
    of least squares of log N_opt. Between budgets of one size log L is a line in log C.

    Args:
        table: the runs, of several sizes with several budgets each.
        arms: those used, names or patterns.
        metric: the loss.

    Returns:
        By seed: `beta`; `sizes`, how many different ones are the best somewhere.

    Raises:
        ValueError: for a pattern that no arm has, or a seed of which no two sizes share a compute.

    Source: "Scaling Laws for Autoregressive Generative Modeling", arXiv 2010.14701.
    """
    used = matching(dict.fromkeys(run["arm"] for run in table), "arms", arms)
    found: BySeed = {"beta": {}, "sizes": {}}
    for seed in dict.fromkeys(run["seed"] for run in table):
        runs = [r for r in table if r["seed"] == seed and r["arm"] in used and _ended(r)]
        points = from_runs(runs, laws.find("chinchilla"), metric)
        n, d = (np.log(points.columns[name]) for name in ("parameters", "tokens"))
        computes, best = _frontier(n, np.log(6) + n + d, np.log(points.losses))
        if len(computes) < 2:
            raise ValueError(f"seed {seed}: no two sizes were trained with the same compute")
        found["beta"][seed] = float(np.polyfit(computes, best, 1)[0])
        found["sizes"][seed] = float(len(np.unique(best)))
    return found


def _frontier(n: np.ndarray, c: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log C at which several sizes can be compared, and log N of the best there; all logarithms."""
    ends = sorted((c[n == size].min(), c[n == size].max()) for size in np.unique(n))
    low, high = ends[1][0], sorted(end for _, end in ends)[-2]
    computes = np.linspace(low, high, 64) if low < high else np.empty(0)
    curves = []
    for size in np.unique(n):
        own = n == size
        order = np.argsort(c[own])
        inside = {"left": np.inf, "right": np.inf}
        curves.append(np.interp(computes, c[own][order], losses[own][order], **inside))
    compared = np.isfinite(curves).sum(0) > 1
    return computes[compared], np.unique(n)[np.argmin(curves, axis=0)][compared]


def stopped_early(table: Table, **arguments: Any) -> BySeed:
    """How far a fit by the mean of Huber's losses, with the optimizer's default tolerances, is from
    the one by their sum, followed to its minimum.

    Args:
        table: the runs.
        arguments: those of `by_seed`.

    Returns:
        By seed: `excess`, the objective of the former over that of the latter; by exponent of the
        law `<name>_apart`, how far apart the two have it.

    Source: "Chinchilla Scaling: A replication attempt", arXiv 2404.10102.
    """
    found: BySeed = {}
    for seed, result, columns in by_seed(table, **arguments):
        kept = ~result.held_out
        data = {name: columns[name][kept] for name in result.law.columns}
        objective = Objective(result.law, data, result.measured[kept])
        every = (objective.minimise(start, early=True) for start in objective.starts())
        values, reached = min(every, key=lambda pair: pair[1])
        early = dict(zip(result.law.starts, values))
        numbers = {f"{e}_apart": abs(early[e] - result.values[e]) for e in result.law.exponents}
        add(found, seed, {"excess": reached / result.objective, **numbers})
    return found


def matching(names: dict[str, Any], argument: str, patterns: Sequence[str]) -> set[str]:
    """Arms that have one of the patterns.

    Raises:
        ValueError: for a pattern that none has.
    """
    found: set[str] = set()
    for pattern in patterns:
        some = {name for name in names if fnmatchcase(name, pattern)}
        if not some:
            raise ValueError(f"{argument}: no arm is '{pattern}'")
        found |= some
    return found


def _numbers(result: Fit) -> dict[str, float]:
    """What `fitted` gives of one fit."""
    numbers: dict[str, float] = {}
    for name, value, interval in shown(result):
        numbers[name] = value
        if interval:
            numbers[f"{name}_low"], numbers[f"{name}_high"] = interval
    held, measured = result.held_out, result.measured
    logs, left = np.log(measured[~held]), np.log(measured[~held] / result.predicted[~held])
    numbers["r2"] = float(1 - (left**2).mean() / logs.var())
    numbers["fitted_error"] = result.fitted_error
    if result.error is not None:
        lowest = measured[~held].min()
        numbers["error"] = result.error
        numbers["nearest"] = float((np.abs(lowest - measured[held]) / measured[held]).mean())
    return numbers


def _ended(run: dict[str, Any]) -> bool:
    return bool(run["metrics"]) and not run["metrics"].get("diverged")


def _without_embeddings(run: dict[str, Any]) -> dict[str, Any]:
    return {**run, "metrics": {**run["metrics"], "parameters": body_parameters(run)}}


def body_parameters(run: dict[str, Any]) -> float:
    """A transformer's parameters without embeddings, 12 · depth · width²."""
    model = run["config"]["model"]
    return 12.0 * model["depth"] * model["width"] ** 2
