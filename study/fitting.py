"""Fitting a scaling law to measured losses."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from study.laws import Law

HUBER = 1e-3
REFINED = 8
"""Starts that are followed to their minimum, of all combinations the best."""


@dataclass(frozen=True)
class Fit:
    """A law's coordinates, and what they say of the rows they were fitted to and of those held out.

    `intervals` are 95% percentile intervals of the bootstrap by coordinate. `error` is the mean of
    |predicted − measured| / measured over the held-out rows, `fitted_error` that over the others.
    """

    law: Law
    values: dict[str, float]
    objective: float
    predicted: np.ndarray
    measured: np.ndarray
    held_out: np.ndarray
    fitted_error: float
    error: float | None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def shown(result: Fit) -> list[tuple[str, float, tuple[float, float] | None]]:
    """Coefficients, not their logarithms, and exponents: name, value and interval if it has one."""
    rows = []
    for name, value in result.values.items():
        interval = result.intervals.get(name)
        if name.startswith("log_"):
            name, value = name.removeprefix("log_"), math.exp(min(value, 700.0))
            interval = interval and tuple(math.exp(min(end, 700.0)) for end in interval)
        rows.append((name, value, interval))
    return rows


def fit(
    law: Law,
    columns: dict[str, np.ndarray],
    losses: np.ndarray,
    held_out: np.ndarray | None = None,
    resamples: int = 0,
    groups: np.ndarray | None = None,
) -> Fit:
    """Fit a law by the sum of Huber losses (δ = 10⁻³) of the differences in log loss.

    From the best of all combinations of the law's starts, each followed by L-BFGS with exact
    gradients until it no longer falls: stopped early, as by a mean in place of the sum, one finds
    another law (Chinchilla's, arXiv 2404.10102).

    Args:
        law: what is fitted.
        columns: of the data by name, each (rows,); a law of a mixture has a term for each domain
            that has a column `weight_...`.
        losses: (rows,), positive.
        held_out: mask (rows,) of rows that are predicted and not fitted.
        resamples: of the bootstrap; 0 leaves intervals out.
        groups: (rows,), of rows that are resampled together, such as those of one run; default:
            each by itself.

    Raises:
        ValueError: for fewer rows than coordinates, or losses or columns that are not positive.
    """
    law = law.over(columns)
    losses = np.asarray(losses, dtype=float)
    held = np.zeros(len(losses), dtype=bool) if held_out is None else held_out
    data = {name: np.asarray(columns[name], dtype=float) for name in law.columns}
    used = {name: values[~held] for name, values in data.items()}
    if (~held).sum() < len(law.starts):
        raise ValueError(
            f"{(~held).sum()} rows are too few for {len(law.starts)} coordinates of the law"
        )
    if not (losses > 0).all():
        raise ValueError("loss: every one must be positive")
    objective = Objective(law, used, losses[~held])
    best = min((objective.minimise(start) for start in objective.starts()), key=lambda r: r[1])
    values, lowest = best
    predicted = np.exp(evaluate(law, values[None], data)[0])
    errors = np.abs(predicted - losses) / losses
    return Fit(
        law,
        dict(zip(law.starts, values.tolist())),
        lowest,
        predicted,
        losses,
        held,
        float(errors[~held].mean()),
        float(errors[held].mean()) if held.any() else None,
        bootstrap(
            law, used, losses[~held], values, resamples, None if groups is None else groups[~held]
        ),
    )


def bootstrap(
    law: Law,
    columns: dict[str, np.ndarray],
    losses: np.ndarray,
    start: np.ndarray,
    resamples: int,
    groups: np.ndarray | None = None,
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals by coordinate, of fits from `start` to rows drawn with replacement;
    rows of one group are drawn together."""
    if not resamples:
        return {}
    rng = np.random.default_rng(0)
    labels = np.arange(len(losses)) if groups is None else groups
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    found = []
    for _ in range(resamples):
        drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        rows = {name: values[drawn] for name, values in columns.items()}
        found.append(Objective(law, rows, losses[drawn]).minimise(start)[0])
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(law.starts, low, high)}


def evaluate(law: Law, values: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
    """log L of laws (laws, coordinates) at the columns' rows: (laws, rows)."""
    return _log_loss(law, torch.from_numpy(values), _tensors(columns)).numpy()


class Objective:
    """The sum over rows of Huber's loss of log L, of a law's coordinates."""

    def __init__(self, law: Law, columns: dict[str, np.ndarray], losses: np.ndarray) -> None:
        self.law, self.columns = law, _tensors(columns)
        self.logs = torch.from_numpy(np.log(losses))

    def __call__(self, values: Tensor) -> Tensor:
        """Of laws (laws, coordinates): (laws,)."""
        difference = _log_loss(self.law, values, self.columns) - self.logs
        absolute = difference.abs()
        huber = torch.where(
            absolute <= HUBER, 0.5 * difference.square(), HUBER * (absolute - 0.5 * HUBER)
        )
        return huber.sum(-1)

    def starts(self) -> list[np.ndarray]:
        """Of all combinations of the law's starts those whose objective is lowest."""
        axes = [torch.tensor(values, dtype=torch.float64) for values in self.law.starts.values()]
        every = torch.cartesian_prod(*axes).reshape(-1, len(axes))
        with torch.no_grad():
            reached = torch.cat([self(part) for part in every.split(1024)])
        order = reached.nan_to_num(nan=torch.inf).argsort()
        return list(every[order[:REFINED]].numpy())

    def minimise(self, start: np.ndarray, early: bool = False) -> tuple[np.ndarray, float]:
        """The coordinates reached from a start, and the objective there; `early` follows the mean
        over rows, and until SciPy's default tolerances."""
        exact = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 5000, "maxfun": 20000}
        share = 1 / len(self.logs) if early else 1.0
        options = {} if early else exact
        found = minimize(
            self._with_gradient, start, (share,), jac=True, method="L-BFGS-B", options=options
        )
        return found.x, float(found.fun) / share

    def _with_gradient(self, values: np.ndarray, share: float) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        value = share * self(leaf[None])[0]
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient.nan_to_num(0.0).numpy()


def _tensors(columns: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(values, float)) for name, values in columns.items()}


def _log_loss(law: Law, values: Tensor, columns: dict[str, Tensor]) -> Tensor:
    coordinates = {name: values[:, i : i + 1] for i, name in enumerate(law.starts)}
    return law.log_loss(coordinates, columns)
