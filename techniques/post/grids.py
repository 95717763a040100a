"""Uniform grids of a weight matrix, and rounding to them.

A grid is `scale` and `zero`, (rows, groups): one for each of `groups` equal spans of a row's
columns. Its values are scale · (code − zero) for codes 0 to 2^bits − 1.
"""

import torch
from torch import Tensor

from training.errors import UsageError


def minmax(
    weight: Tensor, bits: int, *, group: int | None = None, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """The grid from the smallest to the largest weight of each row or group, both widened to take
    in 0, which is always one of its values.

    Args:
        weight: (rows, ...), flattened to (rows, columns).
        bits: 1 to 16.
        group: columns that share a scale; default: the whole row.
        symmetric: from −max|w| to max|w|, with `zero` 2^(bits−1).

    Returns:
        `scale` and `zero`, of the weight's dtype; all zeros have a grid from −1 to 1.

    Raises:
        ValueError: for another number of bits.
        UsageError: for a group that does not divide the columns.

    Source: https://github.com/IST-DASLab/gptq, `quant.py`, but that a symmetric row without
    negative weights still goes from −max|w|.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits: must be between 1 and 16, got {bits}")
    weight = weight.detach().flatten(1)
    columns = weight.shape[1]
    size = columns if group is None else group
    if size < 1 or columns % size:
        raise UsageError(f"group: must divide the {columns} columns, got {group}")
    grouped = weight.unflatten(1, (-1, size))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = low == high
    low, high = torch.where(empty, -1, low), torch.where(empty, 1, high)
    scale = (high - low) / (2**bits - 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return scale, zero


def codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, of the weight's shape and dtype."""
    matrix = weight.detach().flatten(1)
    scale, zero = spread(scale, matrix.shape[1]), spread(zero, matrix.shape[1])
    return torch.clamp(torch.round(matrix / scale) + zero, 0, 2**bits - 1).view_as(weight)


def quantised(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The weight rounded to the nearest values of its grid.

    Args:
        weight: (rows, ...).
        scale, zero: (rows, groups).
    """
    found = codes(weight, scale, zero, bits).flatten(1)
    columns = found.shape[1]
    return (spread(scale, columns) * (found - spread(zero, columns))).view_as(weight)


def spread(values: Tensor, columns: int) -> Tensor:
    """(rows, groups) to (rows, columns): to each column what its group has."""
    return values.repeat_interleave(columns // values.shape[1], dim=1)
