"""Forecasting a multivariate time series."""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (pandas has no types of its own, and those inferred for its columns are too wide)

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor

from tasks import losses, sources
from tasks.arrays import as_dataset
from training.errors import UsageError

MONTH = 30 * 24
"""Hours in the months of the ETT split."""


class Series:
    """Given the last `context_length` time steps of all channels, forecast the next `horizon`.

    The split is chronological. For the hourly ETT files it is the 12, 4 and 4 months of Informer
    (arXiv 2012.07436), of 30 days; for any other 70%, 10% and 20%. Validation is on the second
    part, whose windows may look back into the first. Channels are standardised with the training
    part's mean and standard deviation, and errors are in those units.

    Args:
        path: a CSV or Parquet file (a first column of dates is dropped), a name under
            `ASSAY_DATA`, or a hub id.
        context_length, horizon: in time steps; 336 and 96 are among the usual ones for ETT.
        channels: columns to keep; default all.

    Raises:
        UsageError: for a series that is not there, too short, or has text or missing values.
    """

    unit = "samples"

    def __init__(
        self,
        *,
        path: str | None = "ett",
        context_length: int = 336,
        horizon: int = 96,
        channels: list[str] | None = None,
    ) -> None:
        if path is None:
            raise UsageError("task.path: which series? a CSV or Parquet file, as task.path=...")
        for key, value in {"context_length": context_length, "horizon": horizon}.items():
            if value < 1:
                raise UsageError(f"task.{key}: must be at least 1, got {value}")
        values = _read(path, channels)
        first, second = _bounds(path, len(values))
        mean, std = values[:first].mean(0), values[:first].std(0)
        self.values = torch.from_numpy((values - mean) / np.where(std > 0, std, 1.0)).float()
        self.context_length, self.horizon = context_length, horizon
        self.train = _starts(0, first, context_length, horizon, path)
        self.validation = _starts(first - context_length, second, context_length, horizon, path)
        width = self.values.shape[1]
        self.dims = {"in_features": context_length * width, "out_features": horizon * width}

    def count(self, batch: dict[str, Any]) -> int:
        """Windows in a batch."""
        return len(batch["labels"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`past_values` (batch, context_length, channels), `labels` (batch, horizon, channels)."""
        steps = torch.arange(self.context_length + self.horizon)
        windows = self.values[rows["start"][:, None] + steps]
        past, future = windows.split([self.context_length, self.horizon], dim=1)
        return {"past_values": past.contiguous(), "labels": future.contiguous()}

    loss = staticmethod(losses.squared_error)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Squared (`mse`) and absolute (`mae`) errors."""
        labels = batch["labels"]
        error = outputs["logits"].view(labels.shape).float() - labels
        return {"mse": error.square(), "mae": error.abs()}


def _read(path: str, channels: list[str] | None) -> np.ndarray:
    found = sources.load(path)
    table: pd.DataFrame = sources.split(found, "train", "task.path", path).to_pandas()  # type: ignore[assignment]
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
