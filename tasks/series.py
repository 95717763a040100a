"""Forecasting a multivariate time series."""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (pandas has no types of its own, and those inferred for its columns are too wide)

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor

from tasks import sources
from tasks.arrays import as_dataset
from tasks.losses import precise
from training.errors import UsageError

MONTH = 30 * 24
"""Hours in the months of the ETT split."""

LORENZ96 = "lorenz96"
"""The path of the series that is generated."""


class Series:
    """Given the last `context_length` time steps of all channels, forecast the next `horizon`.

    The split is chronological. For the hourly ETT files it is the 12, 4 and 4 months of Informer
    (arXiv 2012.07436), of 30 days; for any other 70%, 10% and 20%. Validation is on the second
    part, whose windows may look back into the first. Channels are standardised with the training
    part's mean and standard deviation, and errors are in those units.

    A stochastic model makes an ensemble of `members` forecasts of each window, one for each row of
    the batch's `noise`; a model that takes no noise makes one. `logits` hold them as (batch,
    members, horizon, channels), with members left out where there is one; dimensions after the
    members may be flat.

    Args:
        path: `lorenz96`, which is generated (see `lorenz96`); a CSV or Parquet file (a first column
            of dates is dropped); a name under `ASSAY_DATA`; or a hub id.
        context_length, horizon: in time steps; 336 and 96 are among the usual ones for ETT.
        channels: columns to keep; default all.
        members: forecasts of each window, in training and validation alike; default: no noise.
        noise_features: independent standard normal numbers that each member is given; 4, as in
            anemoi's `noise_channels_dim`.

    Raises:
        UsageError: for a series that is not there, too short, or has text or missing values, or
            an ensemble of fewer than two.
    """

    unit = "samples"

    def __init__(
        self,
        *,
        path: str | None = "ett",
        context_length: int = 336,
        horizon: int = 96,
        channels: list[str] | None = None,
        members: int | None = None,
        noise_features: int = 4,
    ) -> None:
        if path is None:
            raise UsageError("task.path: which series? a CSV or Parquet file, as task.path=...")
        sizes = {
            "context_length": context_length,
            "horizon": horizon,
            "noise_features": noise_features,
        }
        for key, value in sizes.items():
            if value < 1:
                raise UsageError(f"task.{key}: must be at least 1, got {value}")
        if members is not None and members < 2:
            raise UsageError(f"task.members: an ensemble has at least 2, got {members}")
        values = _read(path, channels)
        first, second = _bounds(path, len(values))
        mean, std = values[:first].mean(0), values[:first].std(0)
        self.values = torch.from_numpy((values - mean) / np.where(std > 0, std, 1.0)).float()
        self.context_length, self.horizon = context_length, horizon
        self.members, self.noise_features = members, noise_features
        self.train = _starts(0, first, context_length, horizon, path)
        self.validation = _starts(first - context_length, second, context_length, horizon, path)
        width = self.values.shape[1]
        self.dims = {"in_features": context_length * width, "out_features": horizon * width}
        if members:
            self.dims["noise_features"] = noise_features

    def count(self, batch: dict[str, Any]) -> int:
        """Windows in a batch."""
        return len(batch["labels"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`past_values` (batch, context_length, channels), `labels` (batch, horizon, channels) and,
        for an ensemble, `noise` (batch, members, noise_features)."""
        steps = torch.arange(self.context_length + self.horizon)
        windows = self.values[rows["start"][:, None] + steps]
        past, future = windows.split([self.context_length, self.horizon], dim=1)
        batch = {"past_values": past.contiguous(), "labels": future.contiguous()}
        if self.members:
            shape = (len(windows), self.members, self.noise_features)
            batch["noise"] = torch.randn(shape, generator=generator)
        return batch

    def loss(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        """Squared error, of an ensemble its members' mean."""
        return squared_error(outputs, batch)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Squared (`mse`) and absolute (`mae`) errors of the forecast or the ensemble's mean.

        Of an ensemble of M also the fair `crps`, whose expectation does not depend on M, and its
        `variance`: that of the sample, unbiased, times (M + 1)/M, which is what `mse` is on average
        where the label is as likely as any member.
        """
        labels = batch["labels"]
        members = forecasts(outputs, labels)
        error = members.mean(1) - labels
        scores = {"mse": error.square(), "mae": error.abs()}
        if (size := members.shape[1]) > 1:
            scores["crps"] = fair_crps(members, labels)
            scores["variance"] = members.var(1) * (size + 1) / size
        return scores

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Of an ensemble `spread_skill`, √(variance/mse): below 1 its spread is too small, above 1
        too large."""
        if "variance" not in means:
            return {}
        return {"spread_skill": math.sqrt(means["variance"] / max(means["mse"], 1e-30))}


def forecasts(outputs: Any, labels: Tensor) -> Tensor:
    """The ensemble as (batch, members, horizon, channels), at least in float32; one member where
    the model makes one forecast."""
    logits = outputs["logits"]
    logits = precise(logits)
    return logits.reshape(len(labels), -1, *labels.shape[1:])


def squared_error(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Squared error, mean over the members, shaped like the labels. Minimised where every member is
    the conditional mean: an ensemble without spread."""
    labels = batch["labels"]
    return (forecasts(outputs, labels) - labels[:, None]).square().mean(1)


def fair_crps(members: Tensor, labels: Tensor) -> Tensor:
    """mean|xᵢ − y| − Σᵢⱼ|xᵢ − xⱼ| / (2M(M − 1)) of members (batch, M, ...), M at least 2, and
    labels (batch, ...), shaped like the labels.

    Sorted, the double sum is 2·Σᵢ (2i − M − 1)·x₍ᵢ₎.
    """
    size = members.shape[1]
    rank = torch.arange(1 - size, size, 2, device=members.device, dtype=members.dtype)
    spread = torch.tensordot(members.sort(1).values.movedim(1, -1), rank, 1)
    return (members - labels[:, None]).abs().mean(1) - spread / (size * (size - 1))


def lorenz96(
    *, steps: int = 10_000, size: int = 40, forcing: float = 8.0, interval: float = 0.05
) -> pd.DataFrame:
    """The Lorenz-96 system, ẋₖ = (xₖ₊₁ − xₖ₋₂)·xₖ₋₁ − xₖ + F on a ring, chaotic: columns x1, x2...

    Classical Runge-Kutta steps of `interval` (0.05, six hours of weather by Lorenz's reckoning)
    from xₖ = F with x₁ larger by 0.01; what is returned begins after 1000 of them, when the start
    is forgotten. Nothing is random, and double precision gives the same bits everywhere that
    rounds as IEEE 754 says.

    Args:
        steps: rows.
        size, forcing: number of variables and F; 40 and 8, as usual.
        interval: of time between rows.

    Source: Lorenz and Emanuel, "Optimal Sites for Supplementary Weather Observations", 1998.
    """
    ring = np.arange(size)
    after, before, twice = (ring + 1) % size, ring - 1, ring - 2

    def slope(x: np.ndarray) -> np.ndarray:
        return (x[after] - x[twice]) * x[before] - x + forcing

    x = np.full(size, forcing)
    x[0] += 0.01
    rows = np.empty((1000 + steps, size))
    for row in rows:
        row[:] = x
        a = slope(x)
        b = slope(x + interval / 2 * a)
        c = slope(x + interval / 2 * b)
        d = slope(x + interval * c)
        x = x + interval / 6 * (a + 2 * b + 2 * c + d)
    return pd.DataFrame(rows[1000:], columns=[f"x{k + 1}" for k in range(size)])


def spikes(
    dataset: Dataset, *, task: Series, fraction: float = 0.01, size: float = 10.0, seed: int = 0
) -> Dataset:
    """A training set with outliers, for `data.transforms`: to a random `fraction` of the values of
    the training part, up to where validation begins to look, `size` standard deviations are added
    with a random sign. They are in what is forecast and in what forecasts are made from.

    Raises:
        ValueError: for a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected 0 to 1, got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    part = task.values[: task.validation[0]["start"]]
    hit = torch.rand(part.shape, generator=generator) < fraction
    sign = torch.randint(2, part.shape, generator=generator) * 2 - 1
    part += hit * sign * size
    return dataset


def _read(path: str, channels: list[str] | None) -> np.ndarray:
    table: pd.DataFrame = lorenz96() if path == LORENZ96 else _load(path)
    first = table.columns[0]
    if not pd.api.types.is_numeric_dtype(table[first]):
        dates = pd.to_datetime(table[first], errors="coerce")
        if dates.isna().any():
            raise UsageError(f"'{path}': column '{first}' is text, neither numbers nor dates")
        table = table.drop(columns=first)
    for name in channels or []:
        sources.column(Dataset.from_pandas(table), name, "task.channels", path)
    table = table[channels] if channels else table
    for name in table:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise UsageError(f"'{path}': column '{name}' is text; name others in task.channels")
        if table[name].isna().any():
            raise UsageError(f"'{path}': column '{name}' has rows without a value; fill them in")
        if not np.isfinite(table[name]).all():
            raise UsageError(f"'{path}': column '{name}' has infinite values")
    if not len(table.columns):
        raise UsageError(f"'{path}' has no column of numbers")
    return table.to_numpy(np.float64)


def _load(path: str) -> pd.DataFrame:
    found = sources.load(path, known=[LORENZ96])
    return sources.split(found, "train", "task.path", path).to_pandas()  # type: ignore[return-value]


def _bounds(path: str, length: int) -> tuple[int, int]:
    """Where the training and the validation part end."""
    local = sources.locate(path)
    files = [local] if local is None or local.is_file() else sorted(local.glob("*.csv"))
    hourly = all(f is not None and Path(f).stem in ("ETTh1", "ETTh2") for f in files)
    if files and hourly and length >= 20 * MONTH:
        return 12 * MONTH, 16 * MONTH
    return int(0.7 * length), int(0.8 * length)


def _starts(first: int, end: int, context_length: int, horizon: int, path: str) -> Dataset:
    """First time steps of the windows within [first, end)."""
    starts = np.arange(max(first, 0), end - context_length - horizon + 1)
    if not len(starts):
        raise UsageError(
            f"'{path}': a part of {end - max(first, 0)} time steps is shorter than "
            f"task.context_length + task.horizon = {context_length + horizon}"
        )
    return as_dataset({"start": starts})
