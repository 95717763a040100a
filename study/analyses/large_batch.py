"""How many steps and samples a goal takes at each batch size."""

import math
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from study.analyses import BySeed, Table


def tradeoff(table: Table) -> BySeed:
    """Fit (S/S_min − 1)(E/E_min − 1) = 1 to the steps S and samples E = B·S that runs of several
    batch sizes B took to their goal, which is S = S_min + E_min/B, and compare the critical batch
    size E_min/S_min with the noise scale that `study.probes.gradient_noise_scale` recorded.

    Runs that took all of `trainer.max_steps` have not reached their goal and are left out. The fit
    is of least squares in log S.

    Returns:
        By seed: `critical`, the critical batch size; `noise`, the mean of tr Σ over that of ‖G‖² in
        the run whose batch is nearest to it; `decades`, |log₁₀(noise/critical)|; `growth`, the
        same ratio over the last third of that run's measurements over that of the first third;
        `r2` of the fit, in log S; `s_min`, `e_min`.

    Raises:
        ValueError: when a seed has fewer than three such runs.

    Source: "An Empirical Model of Large-Batch Training", arXiv 1812.06162, equations 2.11 and 2.12.
    """
    found: BySeed = {key: {} for key in ("critical", "noise", "decades", "growth", "r2")}
    found |= {"s_min": {}, "e_min": {}}
    for seed in dict.fromkeys(run["seed"] for run in table):
        runs = [run for run in table if run["seed"] == seed and arrived(run)]
        if len(runs) < 3:
            raise ValueError(f"seed {seed}: a fit needs three runs that reached their goal")
        batches = np.array([_batch(run) for run in runs], dtype=float)
        steps = np.array([run["metrics"]["step"] for run in runs], dtype=float)
        s_min, e_min = solve(batches, steps)
        critical = e_min / s_min
        errors = np.log(steps) - np.log(s_min + e_min / batches)
        spread = np.log(steps).var() * len(steps)
        nearest = min(runs, key=lambda run: abs(math.log(_batch(run) / critical)))
        noise, growth = noise_of(nearest["lines"])
        values = {
            "critical": critical,
            "noise": noise,
            "decades": abs(math.log10(noise / critical)) if noise > 0 else math.inf,
            "growth": growth,
            "r2": 1 - (errors**2).sum() / spread if spread else 0.0,
            "s_min": s_min,
            "e_min": e_min,
        }
        for key, value in values.items():
            found[key][seed] = float(value)
    return found


def solve(batches: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """S_min and E_min of steps (runs,) at batch sizes (runs,)."""

    def errors(logs: np.ndarray) -> np.ndarray:
        s_min, e_min = np.exp(logs)
        return np.log(s_min + e_min / batches) - np.log(steps)

    start = np.log([steps.min(), (steps * batches).min()])
    s_min, e_min = np.exp(least_squares(errors, start).x)
    return float(s_min), float(e_min)


def noise_of(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """The mean of tr Σ over that of ‖G‖² in a run's lines, and that of the last third over that of
    the first."""
    pairs = [
        (line["probe/gradient_noise"], line["probe/gradient_square"])
        for line in lines
        if "probe/gradient_noise" in line
    ]
    third = max(1, len(pairs) // 3)

    def ratio(some: list[tuple[float, float]]) -> float:
        noise, square = np.mean(some, axis=0)
        return float(noise / square)

    return ratio(pairs), ratio(pairs[-third:]) / ratio(pairs[:third])


def _batch(run: dict[str, Any]) -> int:
    return run["config"]["trainer"]["batch_size"]


def arrived(run: dict[str, Any]) -> bool:
    """Whether a run has reached its goal before its last step allowed."""
    metrics = run["metrics"]
    ended = metrics.get("step", math.inf) < run["config"]["trainer"]["max_steps"]
    return bool(metrics) and ended and not metrics.get("diverged")
