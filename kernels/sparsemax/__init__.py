"""Sparsemax: the Euclidean projection of scores onto the probability simplex."""

from torch import Tensor

from kernels.backend import choose
from kernels.sparsemax import reference, tiled


def sparsemax(x: Tensor, dim: int = -1, *, backend: str = "auto") -> Tensor:
    """max(x − τ, 0) with τ such that the result sums to 1 (arXiv 1602.02068).

    Half-precision inputs are computed in float32. An entry of −inf is masked: its result and its
    gradient are 0; where all are, the results are 0. The backward keeps only the result.

    Args:
        x: scores, floating point, any shape.
        dim: of the distributions.
        backend: `"auto"`, `"reference"`, `"tiled"` or `"triton"`; Triton takes up to 65,536
            entries a row.

    Returns:
        The same shape and dtype as `x`, from 0 to 1.

    Raises:
        ValueError: for an `x` that is not floating point or has no dimension `dim`, or a backend
            that is not there or cannot take it.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating point, got {x.dtype}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim: must be a dimension of x, which has {x.ndim}, got {dim}")
    chosen = choose(backend, x)
    rows = x.movedim(dim, -1)
    if chosen == "triton" and rows.shape[-1] > LARGEST_ROW:
        if backend == "triton":
            raise ValueError(f"x: Triton takes rows up to {LARGEST_ROW}, got {rows.shape[-1]}")
        chosen = "tiled"
    if chosen == "reference":
        result = reference.sparsemax(rows)
    elif chosen == "tiled":
        result = tiled.Sparsemax.apply(rows)
    else:
        from kernels.sparsemax import triton

        result = triton.Sparsemax.apply(rows)
    return result.movedim(-1, dim)  # type: ignore[union-attr]


LARGEST_ROW = 65_536
