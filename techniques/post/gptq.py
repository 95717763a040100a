"""GPTQ: weights rounded one column after another, each error made up for by those that follow."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from techniques.post import grids
from techniques.post.layers import give, linear_layers, matrix, one_by_one
from training.packing import Affine

if TYPE_CHECKING:
    from training.run import Run


class GPTQ:
    """Quantises every linear and convolutional layer to a min-max grid, so that its outputs, not
    its weights, stay near: `compensated`, layer by layer, each with the inputs that the quantised
    layers before it give.

    Args:
        bits: of a weight.
        samples: of the training set, for the Hessians; 128 as the authors.
        damp: added to the Hessian's diagonal, of its mean; 0.01.
        group: columns that share a scale; default: the whole row. The groups' grids are of the
            weights before any is changed, the authors' `static_groups`.
        symmetric: the grid, as for `grids.minmax`.
        descending: columns in the order of falling diagonals of the Hessian, the authors'
            `actorder`.
        exclude: regular expression of names of layers that are left as they are. The authors leave
            the embedding and the output layer.

    Raises:
        ValueError: for an argument out of range; when it is applied, for a group that does not
            divide a layer's columns, or when no layer is left.

    Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    arXiv 2210.17323; https://github.com/IST-DASLab/gptq, `gptq.py`, `quant.py` and `llama.py`.
    There a block of layers gets the Hessians of its inputs at once, or of those of each layer in
    turn (`true_sequential`), as here.
    """

    def __init__(
        self,
        bits: int = 4,
        samples: int = 128,
        damp: float = 0.01,
        group: int | None = None,
        symmetric: bool = False,
        descending: bool = False,
        exclude: str | None = None,
    ) -> None:
        check(bits, samples, damp)
        self.bits, self.samples, self.damp, self.exclude = bits, samples, damp, exclude
        self.group, self.symmetric, self.descending = group, symmetric, descending

    @torch.no_grad()
    def __call__(self, run: "Run") -> None:
        """Quantise the run's model."""
        layers = linear_layers(run.model, self.exclude)
        for name, layer, hessian in one_by_one(run, layers, self.samples):
            weight = matrix(layer)
            grid = grids.minmax(weight, self.bits, group=self.group, symmetric=self.symmetric)
            nearest = rounding(*grid, self.bits, weight.shape[1])
            give(layer, compensated(weight, hessian, nearest, self.damp, self.descending)[0])
            run.grids[f"{name}.weight"] = Affine(*grid, self.bits)


def rounding(
    scale: Tensor, zero: Tensor, bits: int, columns: int
) -> Callable[[Tensor, int], Tensor]:
    """What `compensated` takes for a uniform grid (rows, groups) of a matrix of so many columns."""
    scale, zero = (grids.spread(x, columns).double() for x in (scale, zero))

    def nearest(column: Tensor, i: int) -> Tensor:
        own = scale[:, i : i + 1], zero[:, i : i + 1]
        return grids.quantised(column[:, None], *own, bits)[:, 0]

    return nearest


def check(bits: int, samples: int, damp: float) -> None:
    """Refuse settings out of range.

    Raises:
        ValueError: naming the setting.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: must be between 1 and 8, got {bits}")
    if samples < 1:
        raise ValueError(f"samples: must be at least 1, got {samples}")
    if not damp > 0:
        raise ValueError(f"damp: must be above 0, got {damp}")


def compensated(
    weight: Tensor,
    hessian: Tensor,
    nearest: Callable[[Tensor, int], Tensor],
    damp: float = 0.01,
    descending: bool = False,
) -> tuple[Tensor, Tensor]:
    """Columns quantised in turn: with (H + λI)⁻¹ = UᵀU, U upper triangular, and e the error of
    column i over U_ii, every later column j has e · U_ij taken from it.

    That is Optimal Brain Quantization's update when all rows go in the same order: U_i: / U_ii is
    row i of the inverse Hessian of the columns that are left, over its diagonal.

    Args:
        weight: (rows, columns).
        hessian: (columns, columns). Where its diagonal is 0, inputs are, and weights become 0
            before they are quantised.
        nearest: `(column (rows,), index) -> (rows,)`, in float64.
        damp: λ over the mean of the diagonal.
        descending: columns in the order of falling diagonals of H.

    Returns:
        The quantised weight and e, both (rows, columns) in float64. By the authors' count, e²/2 is
        what a weight's rounding adds to the loss.
    """
    weight, hessian = weight.double().clone(), hessian.double()
    weight[:, hessian.diagonal() == 0] = 0
    order = ordered(hessian, descending)
    factor = inverse_factor(hessian, damp, order)
    errors = torch.zeros_like(weight)
    for step, i in enumerate(order.tolist()):
        rest = order[step + 1 :]
        chosen = nearest(weight[:, i], i)
        errors[:, i] = (weight[:, i] - chosen) / factor[step, step]
        weight[:, rest] -= torch.outer(errors[:, i], factor[step, step + 1 :])
        weight[:, i] = chosen
    return weight, errors


def ordered(hessian: Tensor, descending: bool) -> Tensor:
    """The order in which columns are quantised."""
    if descending:
        return hessian.diagonal().argsort(descending=True, stable=True)
    return torch.arange(len(hessian), device=hessian.device)


def inverse_factor(hessian: Tensor, damp: float, order: Tensor) -> Tensor:
    """U, upper triangular with UᵀU = (H + λI)⁻¹, of columns in an order; a diagonal of 0 counts as
    1, and λ is `damp` times the mean of the diagonal."""
    dead = hessian.diagonal() == 0
    full = (hessian + torch.diag(dead.to(hessian)))[order][:, order]
    full = full + damp * full.diagonal().mean() * torch.eye(len(full)).to(full)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(full))
    return torch.linalg.cholesky(inverse, upper=True)
