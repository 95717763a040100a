"""Rows of a dataset as tensors."""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

_VIEWS: weakref.WeakKeyDictionary[Dataset, Dataset] = weakref.WeakKeyDictionary()


def fetch(dataset: Dataset, indices: Tensor | Sequence[int]) -> dict[str, Any]:
    """The rows at `indices`, column by column.

    Numbers become tensors of shape (rows,), lists of a fixed length tensors of shape (rows,
    length, ...), both of the column's own type; anything else stays a Python list. The rows are
    read from the memory-mapped table, and nothing else of it is.
    """
    view = _VIEWS.get(dataset)
    if view is None:
        view = _VIEWS[dataset] = dataset.with_format("arrow")
    rows = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    table: pa.Table = view[rows]
    return {name: _column(table[name]) for name in table.column_names}


def _column(column: pa.ChunkedArray) -> Any:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # an empty one stays chunked
        return array.to_pylist()
    shape = [len(array)]
    while pa.types.is_fixed_size_list(array.type):
        shape.append(array.type.list_size)
        array = array.flatten()
    if not _is_number(array.type) or array.null_count:
        return column.to_pylist()
    numbers = array.to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.array(numbers).reshape(shape))


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
