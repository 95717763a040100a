"""Accuracy predicted in two steps: from sizes to loss, from loss to accuracy."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import curve_fit

from study import laws
from study.analyses import BySeed, Table, add
from study.analyses.laws import points_by_seed
from study.fitting import fit

Curve = Callable[[np.ndarray], np.ndarray]


def two_steps(
    table: Table,
    *,
    held_out: Sequence[str],
    arms: Sequence[str] = ("*",),
    metric: str = "val/loss",
    accuracy: str = "val/accuracy",
    chance: float = 0.0,
) -> BySeed:
    """Fit L(N, D) = E + A/N^α + B/D^β and accuracy = a/(1 + exp(−k·(L − L₀))) + b to the runs of a
    ladder, and predict the accuracy of larger ones from their N and D.

    Args:
        table: the runs.
        held_out: arms that are predicted, names or patterns.
        arms: those fitted or held out.
        metric: the loss of the task.
        accuracy: from 0 to 1.
        chance: accuracy of guessing, where the fit starts.

    Returns:
        By seed, means over the held-out runs: `error`, |predicted − measured| accuracy;
        `of_loss`, the same from their measured losses, the second step's part; `one_step`, that of
        a power law with a floor in compute, of 1 − accuracy; `loss_error`, the first step's
        |predicted − measured| / measured.

    Raises:
        ValueError: for a pattern that no arm has, or a seed with too few runs for the law.

    Source: "Establishing Task Scaling Laws via Compute-Efficient Model Ladders", arXiv 2412.04403;
    https://github.com/allenai/OLMo-ladder, src/scripts/step2.py (bounds, starts and the point of no
    loss and full accuracy), src/scaling/fitting_functions.py.
    """
    found: BySeed = {}
    chinchilla, power = laws.find("chinchilla"), laws.find("power")
    losses = points_by_seed(table, chinchilla, arms, held_out, metric)
    rights = points_by_seed(table, power, arms, held_out, accuracy, "compute")
    for (seed, points, held), (_, others, _) in zip(losses, rights):
        right = others.losses
        first = fit(chinchilla, points.columns, points.losses, held)
        one = fit(power, others.columns, 1 - right, held)
        curve = sigmoid(points.losses[~held], right[~held], chance)
        numbers = {
            "error": np.abs(curve(first.predicted[held]) - right[held]).mean(),
            "of_loss": np.abs(curve(first.measured[held]) - right[held]).mean(),
            "one_step": np.abs(one.predicted[held] - one.measured[held]).mean(),
            "loss_error": first.error or 0.0,
        }
        add(found, seed, numbers)
    return found


def sigmoid(losses: np.ndarray, accuracies: np.ndarray, chance: float = 0.0) -> Curve:
    """The fitted function of a loss, from losses and accuracies (runs,) and the point (0, 1)."""

    def curve(loss: np.ndarray, a: float, start: float, k: float, b: float) -> np.ndarray:
        return a / (1 + np.exp(-k * (loss - start))) + b

    found, _ = curve_fit(
        curve,
        np.append(losses, 0.0),
        np.append(accuracies, 1.0),
        p0=[chance - 1.0, 0.9, 3.0, 1.0],
        bounds=([-1.0, 0.0, 0.0, 0.0], [0.0, np.inf, np.inf, 1.0]),
        max_nfev=100_000,
    )
    return lambda loss: curve(loss, *found)
