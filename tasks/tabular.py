"""Classification or regression of the rows of a table."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
# (pandas has no types of its own, and those inferred for its columns are too wide)

from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor

from tasks import binary, losses, sources
from tasks.arrays import as_dataset, is_classifier
from training.errors import UsageError, nearest

BUNDLED = ("breast_cancer", "diabetes", "iris", "wine")
"""Tables that scikit-learn brings."""

MOST_CLASSES = 50
"""A whole-number target with more values than this is regressed, unless `kind` says otherwise."""


class Tabular:
    """Predict one column of a table from the others.

    A fixed fifth of the rows is for validation (stratified where classes are), unless the dataset
    brings a split `validation` or `test`. Features are standardised with the training rows' mean
    and standard deviation, and so is a real target. Classes are numbered in the order of the
    target's values; two have the metrics of `tasks.binary` too.

    Args:
        path: `iris`, `wine`, `breast_cancer` or `diabetes` of scikit-learn; a CSV or Parquet file;
            a name under `ASSAY_DATA`; or a hub id.
        target: column to predict; for a file or a hub dataset.
        kind: `"classification"`, `"regression"`, or null: regression where the target is real or
            has more than 50 values.
        categorical: null refuses a column of text, `"onehot"` makes a feature of each of its
            values.
        name: the configuration of a hub dataset that has several.
        objective: the model's; `"reconstruction"` leaves out the accuracy.

    Raises:
        UsageError: for a table, column or value that cannot be used, naming it.
    """

    unit = "samples"

    def __init__(
        self,
        *,
        path: str = "iris",
        target: str | None = None,
        kind: str | None = None,
        categorical: str | None = None,
        name: str | None = None,
        objective: str | None = None,
    ) -> None:
        if kind not in (None, "classification", "regression"):
            raise UsageError(f"task.kind: classification, regression or null, got '{kind}'")
        if categorical not in (None, "onehot"):
            raise UsageError(f"task.categorical: onehot or null, got '{categorical}'")
        self.objective = objective
        table, held_out, target = _tables(path, target, name)
        whole = pd.concat([table, held_out], ignore_index=True) if held_out is not None else table
        labels, classes = _labels(whole, target, kind, path)
        self.kind = "regression" if classes is None else "classification"
        features = _features(whole.drop(columns=target), categorical, path)

        known = len(table) if held_out is not None else None
        train, validation = _split(len(whole), known, None if classes is None else labels)
        mean, std = features[train].mean(0), features[train].std(0)
        features = (features - mean) / np.where(std > 0, std, 1.0)
        if classes is None:
            spread = labels[train].std()
            if not spread > 0:
                raise UsageError(f"task.target: '{target}' of '{path}' has one value only")
            labels = (labels - labels[train].mean()) / spread
        self.train: Dataset = as_dataset({"features": features[train], "labels": labels[train]})
        self.validation: Dataset = as_dataset(
            {"features": features[validation], "labels": labels[validation]}
        )
        outputs = 1 if classes is None else classes
        self.dims = {"in_features": features.shape[1], "out_features": outputs}

    def count(self, batch: dict[str, Any]) -> int:
        """Rows in a batch."""
        return len(batch["labels"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`features` (batch, in_features) and `labels` (batch,)."""
        return rows

    loss = staticmethod(losses.supervised)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Whether each class was right, or the absolute error."""
        if not is_classifier(self):
            return {}
        if self.kind == "regression":
            labels = batch["labels"]
            return {"mae": (outputs["logits"].view(labels.shape).float() - labels).abs()}
        return {"accuracy": losses.correct(outputs, batch)}

    def collect(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Of two classes, what the metrics need."""
        two = self.dims["out_features"] == 2 and is_classifier(self)
        return binary.predictions(outputs, batch) if two else {}

    def summarise(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Of two classes, `tasks.binary.metrics`."""
        return binary.metrics(rows) if rows else {}


def _tables(
    path: str, target: str | None, name: str | None
) -> tuple[pd.DataFrame, pd.DataFrame | None, str]:
    """Training table, validation table where the dataset has one, and the target's name."""
    if path in BUNDLED:
        from sklearn import datasets

        frame = getattr(datasets, f"load_{path}")(as_frame=True).frame
        chosen = target or "target"
        if chosen not in frame:
            hint = nearest(chosen, frame.columns)
            raise UsageError(f"task.target: '{path}' has no column '{chosen}'{hint}")
        return frame, None, chosen
    if sources.locate(path) is None and "/" not in path and nearest(path, BUNDLED)[2:5] == "did":
        raise UsageError(f"task.path: no dataset '{path}'{nearest(path, BUNDLED)}")
    found = sources.load(path, name)
    if target is None:
        columns = ", ".join(found["train"].column_names[:12])
        raise UsageError(f"task.target: which column of '{path}'? one of {columns}")
    train = sources.split(found, "train", "task.path", path)
    sources.column(train, target, "task.target", path)
    held_out = next((found[n] for n in ("validation", "test") if n in found), None)
    frames = [None if d is None else d.to_pandas() for d in (train, held_out)]
    return frames[0], frames[1], target  # type: ignore[return-value]


def _labels(
    table: pd.DataFrame, target: str, kind: str | None, path: str
) -> tuple[np.ndarray, int | None]:
    """Labels, and the number of classes or `None` for regression."""
    column = table[target]
    if column.isna().any():
        missing = int(column.isna().sum())
        raise UsageError(f"task.target: '{target}' of '{path}' lacks a value in {missing} rows")
    values = column.nunique()
    real = pd.api.types.is_float_dtype(column) and not (column % 1 == 0).all()
    numeric = pd.api.types.is_numeric_dtype(column)
    if kind is None:
        kind = "regression" if real or (numeric and values > MOST_CLASSES) else "classification"
    if kind == "regression":
        if not numeric:
            raise UsageError(f"task.target: '{target}' of '{path}' is text, not a number")
        labels = column.to_numpy(np.float32)
        if not np.isfinite(labels).all():
            raise UsageError(f"task.target: '{target}' of '{path}' has infinite values")
        return labels, None
    if values < 2:
        raise UsageError(f"task.target: '{target}' of '{path}' has one value only")
    codes, _ = pd.factorize(column, sort=True)
    return codes.astype(np.int64), values


def _features(table: pd.DataFrame, categorical: str | None, path: str) -> np.ndarray:
    text = [str(c) for c in table if not pd.api.types.is_numeric_dtype(table[c])]
    if text and categorical is None:
        raise UsageError(
            f"'{path}': column '{text[0]}' is text; task.categorical=onehot makes a feature of "
            "each of its values, or drop the column"
        )
    missing = [str(c) for c in table if table[c].isna().any()]
    if missing:
        raise UsageError(f"'{path}': column '{missing[0]}' has rows without a value; fill them in")
    if text:
        table = pd.get_dummies(table, columns=text)
    if not len(table.columns):
        raise UsageError(f"'{path}' has no column beside the target")
    values = table.to_numpy(np.float32)
    infinite = np.flatnonzero(~np.isfinite(values).all(0))
    if len(infinite):
        name = table.columns[infinite[0]]
        raise UsageError(f"'{path}': column '{name}' has infinite values, or too large for float32")
    return values


def _split(
    rows: int, known: int | None, classes: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the two splits; the first `known` rows are for training where given."""
    from sklearn.model_selection import train_test_split

    if known is not None:
        return np.arange(known), np.arange(known, rows)
    if rows < 5:
        raise UsageError(f"task.path: the table has {rows} rows; at least 5 are needed")
    if classes is not None and np.bincount(classes).min() < 2:
        classes = None  # a class of one row cannot be in both
    train, validation = train_test_split(
        np.arange(rows), test_size=0.2, random_state=0, stratify=classes
    )
    return train, validation
