"""Arrays in memory as datasets."""

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset


def as_dataset(columns: dict[str, np.ndarray]) -> Dataset:
    """A dataset of arrays of shape (rows, ...): float32 where they are real, int64 where whole."""
    return Dataset(pa.table({name: _column(array) for name, array in columns.items()}))


def is_classifier(task: Any) -> bool:
    """Whether the model's outputs are scores of classes, not a reconstruction of its input."""
    return task.objective != "reconstruction"


def _column(array: np.ndarray) -> pa.Array:
    real = np.issubdtype(array.dtype, np.floating)
    flat = array.astype(np.float32 if real else np.int64, copy=False)
    values = pa.array(np.ascontiguousarray(flat).reshape(-1))
    for size in reversed(array.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    return values
