"""The rows a scaling law is fitted to, from runs or from a file of published points."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from study.laws import WEIGHT, Law
from study.laws.annealing import areas
from training.components import call, factory
from training.configs import Config
from training.errors import UsageError, nearest

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Points:
    """Columns and losses, each (rows,); `groups` numbers the run a row is of, in order."""

    columns: Columns
    losses: np.ndarray
    groups: np.ndarray

    def largest(self, count: int) -> np.ndarray:
        """Mask (rows,) of the so many largest: where there are several rows of a run the last runs,
        else by parameters times tokens where the columns have them, else by the first column.

        Raises:
            UsageError: when none would be left.
        """
        runs = np.unique(self.groups)
        if not 0 <= count < len(runs):
            raise UsageError(f"--hold-out: must be below the {len(runs)} there are, got {count}")
        if len(runs) < len(self.groups):
            return np.isin(self.groups, runs[len(runs) - count :])
        both = {"parameters", "tokens"} <= self.columns.keys()
        first = next(iter(self.columns.values()))
        size = self.columns["parameters"] * self.columns["tokens"] if both else first
        held = np.zeros(len(size), dtype=bool)
        held[np.argsort(size, kind="stable")[len(size) - count :]] = True
        return held


def from_csv(path: Path, law: Law, x: str | None = None) -> Points:
    """Rows of a CSV file with a header: the law's columns and `loss`. `compute` is 6 · parameters ·
    tokens, whichever of the three is not there. A law of a mixture has columns `weight_...` too.

    Args:
        path: of the file.
        law: whose columns are read.
        x: column that the law calls `x`; default: a column of that name.

    Raises:
        UsageError: when it cannot be read, lacks a column, or has something else than numbers.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--csv {path}: cannot be read: {error}") from error
    if not rows:
        raise UsageError(f"--csv {path}: has no rows")
    read: Columns = {}
    for name in rows[0]:
        try:
            read[name] = np.array([float(row[name]) for row in rows])
        except (TypeError, ValueError):
            continue  # a column of text
    read = {name: values for name, values in read.items() if np.isfinite(values).all()}
    _complete(read)
    columns = {}
    for name in (*law.columns, "loss"):
        wanted = x if name == "x" and x else name
        if wanted not in read:
            hint = nearest(wanted, read)
            raise UsageError(f"--csv {path}: no column of numbers '{wanted}'{hint}")
        columns[name] = read[wanted]
    losses = columns.pop("loss")
    if law.domains:
        columns |= _shares({n: read[n] for n in read if n.startswith(WEIGHT)}, f"--csv {path}")
    return Points(columns, losses, np.arange(len(losses)))


def _shares(weights: Columns, where: str) -> Columns:
    """Weights of domains, of which each row sums to one."""
    total = sum(weights.values(), np.zeros(()))
    if not weights or min(map(np.min, weights.values())) < 0 or not np.all(total > 0):
        raise UsageError(f"{where}: needs columns {WEIGHT}DOMAIN, at least 0 and some above it")
    return {name: values / total for name, values in weights.items()}


def _complete(read: Columns) -> None:
    """Work out of parameters, tokens and compute the one that is not there."""
    n, d, c = (read.get(name) for name in ("parameters", "tokens", "compute"))
    if c is None and n is not None and d is not None:
        read["compute"] = 6 * n * d
    elif d is None and n is not None and c is not None:
        read["tokens"] = c / (6 * n)
    elif n is None and d is not None and c is not None:
        read["parameters"] = c / (6 * d)


def from_runs(
    runs: Sequence[dict[str, Any]],
    law: Law,
    metric: str = "val/loss",
    x: str | None = None,
    other: str | None = None,
) -> Points:
    """A row of each run, or of a law of the learning rate one of each of its evaluations. Of a law
    of a mixture the weights are those of the sampler `training.data.Mixture`.

    Args:
        runs: as `study.compare.load` gives them.
        law: whose columns are worked out.
        metric: the loss.
        x: what the law calls `x`: `parameters`, `tokens`, `compute`, or a key of the configuration
            as `model.width`.
        other: metric that the law calls `other_loss`.

    Raises:
        UsageError: for a run without a metric or a mixture's weights, or an unknown `x`.
    """
    rows: list[dict[str, float]] = []
    groups: list[int] = []
    for number, run in enumerate(runs):
        own = _curve(run, metric) if "annealing" in law.columns else [_last(run, metric)]
        for row in own:
            if "x" in law.columns:
                row["x"] = _chosen(run, row, x)
            if "other_loss" in law.columns:
                row["other_loss"] = _metric(run, other or "", "--other")
        rows += own
        groups += [number] * len(own)
    columns = {name: np.array([row[name] for row in rows]) for name in law.columns}
    if law.domains:
        columns |= _mixtures(runs)
    return Points(columns, np.array([row["loss"] for row in rows]), np.array(groups))


def _mixtures(runs: Sequence[dict[str, Any]]) -> Columns:
    """The share of each domain in each run's training data, a row of each run."""
    rows = [run["config"]["data"]["sampler"].get("weights") for run in runs]
    without = next((run for run, row in zip(runs, rows) if not row), None)
    if without is not None:
        raise UsageError(
            f"law: {without['run_dir']} has no data.sampler.weights, as training.data.Mixture has"
        )
    names = dict.fromkeys(name for row in rows for name in row)
    weights = {f"{WEIGHT}{n}": np.array([float(row.get(n, 0)) for row in rows]) for n in names}
    return _shares(weights, "data.sampler.weights")


def _last(run: dict[str, Any], metric: str) -> dict[str, float]:
    """A run's parameters, the tokens (or samples) it trained on, its compute and its loss."""
    config = run["config"]
    samples = config["trainer"]["batch_size"] * run.get("step", run["metrics"].get("step", 0))
    tokens = samples * config["task"].get("context_length", 1)
    n = _metric(run, "parameters", "parameters")
    loss = _metric(run, metric, "--metric")
    return {"parameters": n, "tokens": tokens, "compute": 6 * n * tokens, "loss": loss}


def _curve(run: dict[str, Any], metric: str) -> list[dict[str, float]]:
    """The loss of each evaluation, with the areas under the learning rates up to it."""
    forward, annealing = areas(learning_rates(run["config"]))
    return [
        {
            "forward": float(forward[line["step"] - 1]),
            "annealing": float(annealing[line["step"] - 1]),
            "loss": line[metric],
        }
        for line in run["lines"]
        if metric in line
    ]


def learning_rates(config: Config) -> torch.Tensor:
    """The learning rate of each step of a run, (steps,), float64."""
    steps = config["trainer"]["max_steps"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config["optimizer"]["lr"])
    made = factory(config["schedule"], "schedule")
    schedule = call(made, "schedule", optimizer, max_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return torch.tensor(rates, dtype=torch.float64)


def _chosen(run: dict[str, Any], row: dict[str, float], x: str | None) -> float:
    if x in row and x != "loss":
        return row[x]
    value: Any = run["config"]
    for key in (x or "").split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, int | float):
        return float(value)
    raise UsageError(
        f"--x: parameters, tokens, compute or a number's key as model.width, got '{x or ''}'"
    )


def _metric(run: dict[str, Any], name: str, option: str) -> float:
    value = run["metrics"].get(name)
    if value is None:
        hint = nearest(name, run["metrics"])
        raise UsageError(f"{option}: {run['run_dir']} has no '{name}'{hint}")
    return float(value)
