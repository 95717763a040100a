"""Chains of self-distillation: of kernel ridge regression in closed form, and of networks.

Step t fits α_t·y + (1 − α_t)·f_{t−1} with the same regularisation, f_0 = y: "Even your Teacher
Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation", arXiv
2102.13088; https://github.com/Kennethborup/self_distillation, `toy_example.ipynb`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from study.analyses import BySeed, Table, add
from study.analyses.merging import restored
from techniques.callback import probing


def chain(gram: np.ndarray, y: np.ndarray, ridge: float, weights: Sequence[float]) -> np.ndarray:
    """The coefficients c_t = (K + λI)⁻¹(α_t·y + (1 − α_t)·K·c_{t−1}) of the first fit and of one
    step for each weight, (steps + 1, samples): f_t(x) = k(x, X)·c_t."""
    inverse = np.linalg.inv(gram + ridge * np.eye(len(y)))
    fits = [inverse @ y]
    for weight in weights:
        fits.append(inverse @ (weight * y + (1 - weight) * gram @ fits[-1]))
    return np.stack(fits)


def limit(gram: np.ndarray, y: np.ndarray, ridge: float, weight: float) -> np.ndarray:
    """The coefficients after infinitely many steps of one α: those of the first fit with λ/α in
    place of λ; 0 for α = 0."""
    return weight * np.linalg.inv(weight * gram + ridge * np.eye(len(y))) @ y


def optimal_weight(y: np.ndarray, labelled: np.ndarray, distilled: np.ndarray) -> float:
    """The α in [0, 1] of the least squared error of a step's fit to `y`.

    A fit is linear in its targets, so that of α is α·a + (1 − α)·b, a fitted to the labels alone
    (the first fit) and b to the fit before alone, and the error is a parabola with its minimum at
    ⟨y − b, a − b⟩/‖a − b‖². For networks this is an approximation. 1 where a = b.

    Args:
        y: labels of samples that were not fitted, of any shape.
        labelled, distilled: a and b there, shaped alike.
    """
    change = labelled - distilled
    square = float((change**2).sum())
    return min(max(float(((y - distilled) * change).sum()) / square, 0.0), 1.0) if square else 1.0


def kernel(
    table: Table,
    *,
    draws: int = 100,
    steps: int = 6,
    alpha: float = 0.35,
    gamma: float = 80.0,
    ridge: float = 0.2,
    noise: float = 0.5,
) -> BySeed:
    """The mean squared distance to sin 2πx of the `first` fit to 11 noisy points of it on [0, 1],
    and of the last of `steps` fits: with α = 0 (`zero`), with `alpha` (`fixed`), and with the one
    that is optimal at each step (`optimal`), found by ten more noisy points between those. For each
    of the table's seeds it is the mean over draws of the noise.

    Args:
        draws: of the noise, for each seed.
        steps: fits, the first one counted; like all that follows as in the authors' notebook.
        alpha: α of `fixed`; 0.35 as in their README.
        gamma: of the kernel exp(−γ·(x − x′)²).
        ridge: λ.
        noise: its standard deviation.
    """
    found: BySeed = {name: {} for name in ("first", "zero", "fixed", "optimal")}
    x, between, fine = (np.linspace(*r) for r in ((0, 1, 11), (0.05, 0.95, 10), (0, 1, 101)))
    gram, to_between, to_fine = (_rbf(other, x, gamma) for other in (x, between, fine))
    truth = np.sin(2 * np.pi * fine)
    for seed in sorted({run["seed"] for run in table}):
        rng = np.random.default_rng(seed)
        total = dict.fromkeys(found, 0.0)
        for _ in range(draws):
            y, held_out = (
                np.sin(2 * np.pi * p) + rng.normal(0, noise, len(p)) for p in (x, between)
            )
            weights: list[float] = []
            for _ in range(1, steps):
                fits = to_between @ chain(gram, y, ridge, [*weights, 0.0]).T
                weights.append(optimal_weight(held_out, fits[:, 0], fits[:, -1]))
            own = {"first": [], "optimal": weights}
            own |= {name: [w] * (steps - 1) for name, w in (("zero", 0.0), ("fixed", alpha))}
            for name, chosen in own.items():
                fit = to_fine @ chain(gram, y, ridge, chosen)[-1]
                total[name] += float(((fit - truth) ** 2).mean())
        for name, value in total.items():
            found[name][seed] = value / draws
    return found


def networks(table: Table, *, first: str, distilled: dict[str, float]) -> BySeed:
    """The α that two networks predict, and how the network trained with it does, by seed.

    `estimate` is `optimal_weight` of the arms `first` and that of `distilled` with α = 0, on every
    second validation sample. On the others, the mean squared error of probabilities of the arm
    whose α is nearest (`nearest`), of those with α = 0 (`zero`) and 1 (`first`), and of the best
    and the worst arm for this seed (`best`, `worst`).

    Args:
        table: the runs.
        first: the arm trained on labels alone, the teacher of the others.
        distilled: the α of the arms of the next step, by name; one is 0.

    Raises:
        ValueError: without an α of 0, or for an arm that is not there.
    """
    zero = next((arm for arm, alpha in distilled.items() if alpha == 0), None)
    if zero is None:
        raise ValueError("distilled: no arm has an alpha of 0")
    rows = {(run["arm"], run["seed"]): run for run in table if run["metrics"]}
    missing = [arm for arm in (first, *distilled) if arm not in {name for name, _ in rows}]
    if missing:
        raise ValueError(f"no finished run of the arm '{missing[0]}'")
    found: BySeed = {}
    for seed in sorted({seed for _, seed in rows}):
        arms = [arm for arm in (first, *distilled) if (arm, seed) in rows]
        if len(arms) < 1 + len(distilled):
            continue
        said = {arm: _probabilities(rows[arm, seed]) for arm in arms}
        labels = said[first][1]
        estimate = optimal_weight(labels[::2], said[first][0][::2], said[zero][0][::2])
        errors = {arm: float(((p - labels)[1::2] ** 2).mean()) for arm, (p, _) in said.items()}
        chosen = min(
            (first, *distilled), key=lambda a: abs({first: 1.0, **distilled}[a] - estimate)
        )
        values = {"estimate": estimate, "nearest": errors[chosen], "zero": errors[zero]}
        values |= {"first": errors[first], "best": min(errors.values())}
        add(found, seed, values | {"worst": max(errors.values())})
    return found


def _rbf(x: np.ndarray, other: np.ndarray, gamma: float) -> np.ndarray:
    return np.exp(-gamma * (x[:, None] - other[None]) ** 2)


def _probabilities(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """What a run's last model says of the validation set, and the labels, one-hot."""
    said: list[tuple[Tensor, Tensor]] = []
    for batch, outputs in probing.validation(restored(row)):
        p = outputs["logits"].double().softmax(-1)
        said.append((p, torch.nn.functional.one_hot(batch["labels"], p.shape[-1])))
    probabilities, labels = (torch.cat(each).cpu().numpy() for each in zip(*said))
    return probabilities, labels
