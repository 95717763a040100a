"""One loss predicted from another, between models that are paired by size and tokens."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from study import laws
from study.analyses import BySeed, Table, add
from study.fitting import Fit, fit
from study.laws.loss_to_loss import between
from study.plots import COLOURS, figure
from study.points import from_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def predicted(
    table: Table, *, first: str, second: str, metrics: list[str], held_out: str
) -> BySeed:
    """L₁ = E₁ + K·(L₀ − E₀)^κ fitted to pairs of runs, of which E₁ and E₀ are those of the scaling
    law `kaplan_floor` fitted to each loss.

    Args:
        table: the runs, of arms `FIRST_...` and `SECOND_...`; those with the same ending are a
            pair.
        first, second: what the arms of L₀ and L₁ begin with; the same for two losses of one model.
        metrics: L₀ and L₁.
        held_out: ending of the pair whose L₁ is predicted from its L₀, the largest.

    Returns:
        By seed: `error`, |predicted − measured| / measured of the held-out pair; `alone`, that of
        the scaling law fitted to L₁ without L₀; `nearest`, when the lowest other L₁ is the
        prediction; `r2` of the fitted pairs' losses, `kappa` and `K`.

    Raises:
        ValueError: for a seed with too few pairs or without the held-out one.

    Source: "Loss-to-Loss Prediction: Scaling Laws for All Datasets", arXiv 2411.12925;
    https://github.com/KempnerInstitute/loss-to-loss-notebooks, `loss_relationships.ipynb`.
    """
    found: BySeed = {}
    for seed, result, alone, _ in _by_seed(table, first, second, metrics, held_out):
        held = result.held_out
        measured, left = result.measured[~held], (result.measured - result.predicted)[~held]
        numbers = {
            "error": result.error,
            "alone": alone.error,
            "nearest": abs(measured.min() / result.measured[held][0] - 1),
            "r2": 1 - (left**2).mean() / measured.var(),
            "kappa": result.values["kappa"],
            "K": np.exp(result.values["log_K"]),
        }
        add(found, seed, numbers)
    return found


def drawn(table: Table, *, first: str, second: str, metrics: list[str], held_out: str) -> "Figure":
    """L₁ over L₀ of every seed's pairs, its fitted law, and the held-out pairs.

    Args:
        table, first, second, metrics, held_out: as for `predicted`.
    """
    made = figure(5, 4)
    axes = made.subplots()
    for number, (seed, result, _, other) in enumerate(
        _by_seed(table, first, second, metrics, held_out)
    ):
        colour, held = COLOURS[number % len(COLOURS)], result.held_out
        order = np.argsort(other)
        axes.plot(other[order], result.predicted[order], color=colour, lw=1)
        axes.plot(other[~held], result.measured[~held], "o", ms=3, color=colour)
        axes.plot(other[held], result.measured[held], "*", ms=9, color=colour, label=f"seed {seed}")
    axes.set_xlabel(f"{metrics[0].removeprefix('val/')}, trained on {first}")
    axes.set_ylabel(f"{metrics[1].removeprefix('val/')}, trained on {second}")
    axes.legend(frameon=False, fontsize=8, title="held out")
    axes.spines[["top", "right"]].set_visible(False)
    return made


def _by_seed(
    table: Table, first: str, second: str, metrics: list[str], held_out: str
) -> Iterator[tuple[int, Fit, Fit, np.ndarray]]:
    """Each seed, the fit between the losses, the scaling law of L₁, and L₀ (pairs,)."""
    for seed in dict.fromkeys(run["seed"] for run in table):
        sides = [
            {
                run["arm"].removeprefix(f"{name}_"): run
                for run in table
                if run["seed"] == seed and run["arm"].startswith(f"{name}_") and run["metrics"]
            }
            for name in (first, second)
        ]
        shared = [ending for ending in sides[0] if ending in sides[1]]
        held = np.array([ending == held_out for ending in shared], dtype=bool)
        if not held.any():
            raise ValueError(f"held_out: seed {seed} has no pair of runs that end in '{held_out}'")
        fits = [
            _scaling([side[ending] for ending in shared], metric, held)
            for side, metric in zip(sides, metrics)
        ]
        floors = [np.exp(own.values["log_E"]) for own in fits]
        law = between(floors[1], floors[0])
        other = {"other_loss": fits[0].measured}
        yield seed, fit(law, other, fits[1].measured, held), fits[1], fits[0].measured


def _scaling(runs: Table, metric: str, held: np.ndarray) -> Fit:
    law = laws.find("kaplan_floor")
    points = from_runs(runs, law, metric)
    return fit(law, points.columns, points.losses, held)
