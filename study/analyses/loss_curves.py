"""Kaplan's law of loss curves: parameters, steps and batch size."""

from typing import Any

import numpy as np
from scipy.optimize import brentq

from study import laws
from study.analyses import BySeed, Table, add
from study.analyses.large_batch import solve
from study.analyses.laws import body_parameters, matching
from study.fitting import Fit, evaluate, fit

Curve = tuple[np.ndarray, np.ndarray]
"""Steps and losses of a run's evaluations."""


def estimated(
    table: Table,
    *,
    batches: list[str],
    held_out: str,
    metric: str = "val/loss",
    after: int = 0,
    levels: int = 8,
) -> BySeed:
    """Estimate every constant of L = (N_c/N)^α_N + (S_c/S_min)^α_S, S_min = S/(1 + B_crit/B) and
    B_crit = B*/L^(1/α_B) from curves of several sizes and batches, and predict one run's curve.

    First the critical batch of each of several losses, from the steps that runs of one size and
    several batches take to it (S = S_min + E_min/B), and the line of log B_crit over log L; then
    the law of N and S_min of all evaluations. N leaves embeddings out (12 · depth · width²), and
    batches are in samples.

    Args:
        table: the runs, with a constant learning rate and evaluations on the way.
        batches: arms of one size, names or patterns, for the critical batch.
        held_out: arm whose curve is predicted.
        metric: the loss.
        after: first step of a curve that counts.
        levels: losses for the critical batch, evenly spaced over those all these arms pass.

    Returns:
        By seed: `error` and `fitted_error`, means of |predicted − measured| / measured over the
        held-out curve and the others; `nearest`, of the held-out curve when that of the largest
        other size is the prediction, step by step, and its end after it; `alpha_N`, `alpha_S`,
        `alpha_B`; `critical`, B_crit at the lowest of the losses.

    Raises:
        ValueError: for a pattern that no arm has, or a seed of which no loss is passed by them all.

    Source: "Unraveling the Mystery of Scaling Laws: Part I", arXiv 2403.06563; "Scaling Laws for
    Neural Language Models", arXiv 2001.08361, equations 1.4, 1.6 and 5.4.
    """
    names = dict.fromkeys(run["arm"] for run in table)
    several, target = matching(names, "batches", batches), matching(names, "held_out", [held_out])
    found: BySeed = {}
    for seed in dict.fromkeys(run["seed"] for run in table):
        runs = [r for r in table if r["seed"] == seed and r["metrics"] and r["arm"] not in target]
        held = [r for r in table if r["seed"] == seed and r["metrics"] and r["arm"] in target]
        if not held:
            continue
        curves = {r["arm"]: curve(r, metric, after) for r in [*runs, *held]}
        reached, critical = critical_batches(
            [_batch(r) for r in runs if r["arm"] in several],
            [curves[r["arm"]] for r in runs if r["arm"] in several],
            levels,
        )
        if not len(reached):
            raise ValueError(f"seed {seed}: no loss is passed by all of the arms of `batches`")
        slope, height = np.polyfit(np.log(reached), np.log(critical), 1)
        line = (float(slope), float(height))
        result = _law(runs, curves, line)
        steps, losses = curves[held[0]["arm"]]
        predicted = np.array([predict(result, line, held[0], step) for step in steps])
        nearest = np.interp(steps, *curves[max(runs, key=body_parameters)["arm"]])
        numbers = {
            "error": np.mean(np.abs(predicted - losses) / losses),
            "nearest": np.mean(np.abs(nearest - losses) / losses),
            "fitted_error": result.fitted_error,
            "alpha_N": result.values["alpha_N"],
            "alpha_S": result.values["alpha_S"],
            "alpha_B": -1 / slope,
            "critical": critical[reached.argmin()],
        }
        add(found, seed, numbers)
    return found


def curve(run: dict[str, Any], metric: str, after: int) -> Curve:
    """A run's evaluations from a step on."""
    lines = [line for line in run["lines"] if metric in line and line["step"] >= after]
    return np.array([x["step"] for x in lines], float), np.array([x[metric] for x in lines], float)


def critical_batches(
    sizes: list[float], curves: list[Curve], levels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Losses that all curves pass, and the critical batch of each, E_min/S_min.

    Args:
        sizes: of the batches.
        curves: of one model at each of them; the first time that one is below a loss counts.
        levels: how many losses.
    """
    lowest = [np.minimum.accumulate(losses) for _, losses in curves]
    low, high = max(x[-1] for x in lowest), min(x[0] for x in lowest)
    if not low < high:
        return np.empty(0), np.empty(0)
    reached = np.geomspace(low, high, levels + 1, endpoint=False)[:-1]
    found = []
    for loss in reached:
        steps = [np.interp(-loss, -best, at) for best, (at, _) in zip(lowest, curves)]
        least, samples = solve(np.array(sizes), np.array(steps))
        found.append(samples / least)
    return reached, np.array(found)


def predict(law: Fit, line: tuple[float, float], run: dict[str, Any], step: float) -> float:
    """The loss L of a run at a step: L = f(N, S/(1 + B_crit(L)/B)), solved for L."""
    values = np.array([list(law.values.values())])

    def excess(log_loss: float) -> float:
        steps = _least(np.array([step]), np.exp([log_loss]), _batch(run), line)
        columns = {"parameters": np.array([body_parameters(run)]), "steps": steps}
        return float(evaluate(law.law, values, columns)[0, 0]) - log_loss

    found: Any = brentq(excess, -7.0, 7.0)
    return float(np.exp(found))


def _law(runs: Table, curves: dict[str, Curve], line: tuple[float, float]) -> Fit:
    """The law of N and S_min of all evaluations."""
    rows = [(run, *curves[run["arm"]]) for run in runs]
    parameters = [np.full(len(steps), body_parameters(run)) for run, steps, _ in rows]
    least = [_least(steps, losses, _batch(run), line) for run, steps, losses in rows]
    columns = {"parameters": np.concatenate(parameters), "steps": np.concatenate(least)}
    losses = np.concatenate([losses for _, _, losses in rows])
    return fit(laws.find("kaplan_steps"), columns, losses)


def _least(
    steps: np.ndarray, losses: np.ndarray, batch: float, line: tuple[float, float]
) -> np.ndarray:
    """S_min of steps after which the losses were reached."""
    slope, height = line
    return steps / (1 + np.exp(height + slope * np.log(losses)) / batch)


def _batch(run: dict[str, Any]) -> float:
    return float(run["config"]["trainer"]["batch_size"])
