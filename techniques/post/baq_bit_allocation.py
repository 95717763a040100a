"""BAQ: more bits for the columns whose rounding costs more."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from techniques.post import gptq, grids
from techniques.post.layers import give, linear_layers, matrix, one_by_one
from training.packing import Spans

if TYPE_CHECKING:
    from training.run import Run

LEAST = 1e-8
"""Added to losses before their logarithm."""


class BAQ:
    """Quantises every linear and convolutional layer as `techniques.post.gptq.GPTQ` does, with bits
    for each column of its own, so that all columns of a layer add about as much to the loss.

    With R bits in each column, GPTQ adds loss_j = Σ_rows e²/2 for column j. If that falls as
    2^(−a·R_j), then the sum is least, at the same mean of the bits, with

    R_j = R + log₂(loss_j / geometric mean of the layer's losses) / a.

    Losses are those of a first pass with R bits over the whole model, whose weights are then put
    back. A row's grid is from its least to its largest weight, 0 taken in, in as many steps as the
    column's levels allow; a column of one level is 0.

    In theory a = 2; the authors' code has 1.95. It makes round(2^R_j) levels, no fewer than 1, not
    a power of two; its mean of log₂ levels is what it calls the rate, near R but not held to it.

    Recorded: `post/baq_bit_allocation/bits`, the mean over weights of log₂ levels; `.../uneven` and
    `.../uneven_uniform`, the standard deviation over a layer's columns of log₂ loss_j, mean over
    layers, with these bits and with R.

    Args:
        bits: R.
        samples: of the training set, for the Hessians; 128.
        damp: λ over the mean of the Hessian's diagonal; 0.01.
        decay: a.
        whole: whole bits, 2^round(R_j) levels, so that no part of a bit is lost on disk.
        exclude: regular expression of names of layers that are left as they are. The authors leave
            the embedding and the output layer.

    Raises:
        ValueError: for an argument out of range; when it is applied, when no layer is left.

    Source: "BAQ: Efficient Bit Allocation Quantization for Large Language Models", arXiv
    2506.05664; https://github.com/CSU-ModelCompression/BAQ, `gptq_baq.py` and `opt_baq.py`.
    """

    def __init__(
        self,
        bits: int = 3,
        samples: int = 128,
        damp: float = 0.01,
        decay: float = 1.95,
        whole: bool = False,
        exclude: str | None = None,
    ) -> None:
        gptq.check(bits, samples, damp)
        if not decay > 0:
            raise ValueError(f"decay: must be above 0, got {decay}")
        self.bits, self.samples, self.damp, self.decay = bits, samples, damp, decay
        self.whole, self.exclude = whole, exclude

    @torch.no_grad()
    def __call__(self, run: "Run") -> None:
        """Quantise the run's model."""
        layers = linear_layers(run.model, self.exclude)
        dense = {name: matrix(layer) for name, layer in layers.items()}
        before: dict[str, Tensor] = {}
        for name, layer, hessian in one_by_one(run, layers, self.samples):
            weight = dense[name]
            grid = grids.minmax(weight, self.bits)
            nearest = gptq.rounding(*grid, self.bits, weight.shape[1])
            found, errors = gptq.compensated(weight, hessian, nearest, self.damp)
            give(layer, found)
            before[name] = losses(errors)
        for name, layer in layers.items():
            give(layer, dense[name])
        after: dict[str, Tensor] = {}
        rates: dict[str, Tensor] = {}
        for name, layer, hessian in one_by_one(run, layers, self.samples):
            levels = allocated(before[name], self.bits, self.decay, self.whole)
            spans = spans_of(dense[name], levels)
            found, errors = gptq.compensated(dense[name], hessian, rounding(spans), self.damp)
            give(layer, found)
            run.grids[f"{name}.weight"] = spans
            after[name], rates[name] = losses(errors), levels.log2()
        sizes = {name: dense[name].numel() for name in rates}
        mean = sum(rates[name].mean() * size for name, size in sizes.items()) / sum(sizes.values())
        run.record(
            {
                "post/baq_bit_allocation/bits": float(mean),
                "post/baq_bit_allocation/uneven": unevenness(after),
                "post/baq_bit_allocation/uneven_uniform": unevenness(before),
            }
        )


def losses(errors: Tensor) -> Tensor:
    """What each column adds to the loss, from the errors of `gptq.compensated`."""
    return errors.square().sum(0) / 2


def allocated(losses: Tensor, bits: float, decay: float, whole: bool) -> Tensor:
    """How many levels each column gets, float64, from the losses with `bits` in each."""
    rates = bits + (losses / (losses + LEAST).log().mean().exp()).log2() / decay
    rates = rates.clamp(min=0)
    return 2 ** rates.round() if whole else (2**rates).round()


def spans_of(weight: Tensor, levels: Tensor) -> Spans:
    """The grid of a matrix whose columns have so many levels; a row of zeros has the span −1, 1."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    empty = low == high
    low, high = torch.where(empty, -1, low), torch.where(empty, 1, high)
    return Spans(low, high, levels[None].float())


def rounding(spans: Spans) -> Callable[[Tensor, int], Tensor]:
    """What `gptq.compensated` takes for it."""
    grid = spans.affine()
    scale, zero = grid.scale.double(), torch.as_tensor(grid.zero).double()
    most = (spans.levels[0] - 1).double()

    def nearest(column: Tensor, i: int) -> Tensor:
        codes = torch.round(column / scale[:, i]) + zero[:, i]
        codes = codes.clamp(min=0).minimum(most[i])
        return scale[:, i] * (codes - zero[:, i])

    return nearest


def unevenness(found: dict[str, Tensor]) -> float:
    """The standard deviation of log₂ of each layer's losses, 0 left out; mean over layers."""
    return float(torch.stack([x[x > 0].log2().std() for x in found.values()]).mean())
