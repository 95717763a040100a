"""LeanQuant: grids that put their values where rounding errors cost most."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from techniques.post.gptq import check, compensated, inverse_factor, ordered
from techniques.post.layers import give, linear_layers, matrix, one_by_one
from training.packing import Codebook

if TYPE_CHECKING:
    from training.run import Run

FEW = 8
"""Values up to which k-means starts from evenly spaced ones; above, from k-means++."""


class LeanQuant:
    """Quantises every linear and convolutional layer as `techniques.post.gptq.GPTQ` does, but each
    row to 2^bits values of its own, learned by weighted k-means: they minimise
    Σ_i U_ii^(−p) · (w_i − nearest value)², with UᵀU = (H + λI)⁻¹ in the order of the columns.

    The paper has (H⁻¹)_ii^(−p) for the weight of column i. The authors' code, followed here, has
    the diagonal of U, whose square is that of the inverse Hessian of the columns not yet quantised:
    p = 4 is there p = 2 of this diagonal. The paper's uniform grid, by a search of scales and
    zeros, is not in their code, and not here.

    Args:
        bits: of a weight.
        exponent: p; 4, what the authors recommend beside 3. At 0 all weights count alike.
        samples: of the training set, for the Hessians; 128.
        damp: λ over the mean of the Hessian's diagonal; 0.1 as they recommend.
        descending: columns in the order of falling diagonals of the Hessian (`--act-order`), as
            they recommend.
        seed: of k-means++.
        exclude: regular expression of names of layers that are left as they are. The authors leave
            the embedding and the output layer.

    The values are rounded to float16, in which the authors' layers keep them.

    Raises:
        ValueError: for an argument out of range; when it is applied, when no layer is left.

    Source: "LeanQuant: Accurate and Scalable Large Language Model Quantization with
    Loss-error-aware Grid", arXiv 2407.10032; https://github.com/LeanModels/LeanQuant,
    `lean_quantizer.py` and the command in `README.md`.
    """

    def __init__(
        self,
        bits: int = 4,
        exponent: float = 4.0,
        samples: int = 128,
        damp: float = 0.1,
        descending: bool = True,
        seed: int = 0,
        exclude: str | None = None,
    ) -> None:
        check(bits, samples, damp)
        if exponent < 0:
            raise ValueError(f"exponent: must be at least 0, got {exponent}")
        self.bits, self.exponent, self.samples, self.damp = bits, exponent, samples, damp
        self.descending, self.seed, self.exclude = descending, seed, exclude

    @torch.no_grad()
    def __call__(self, run: "Run") -> None:
        """Quantise the run's model."""
        layers = linear_layers(run.model, self.exclude)
        for name, layer, hessian in one_by_one(run, layers, self.samples):
            weight = matrix(layer)
            weight[:, hessian.diagonal() == 0] = 0
            costs = importance(hessian, self.exponent, self.damp, self.descending)
            book = learned(weight, costs, self.bits, self.seed).half().float()
            nearest = rounding(book)
            give(layer, compensated(weight, hessian, nearest, self.damp, self.descending)[0])
            run.grids[f"{name}.weight"] = Codebook(book)


def importance(hessian: Tensor, exponent: float, damp: float, descending: bool) -> Tensor:
    """U_ii^(−p) of each column, where the column is, not where it comes in the order."""
    order = ordered(hessian, descending)
    found = torch.empty_like(hessian[0])
    found[order] = inverse_factor(hessian, damp, order).diagonal() ** -exponent
    return found


def learned(weight: Tensor, costs: Tensor, bits: int, seed: int = 0) -> Tensor:
    """The values of each row's grid, (rows, 2^bits) in float32, in ascending order.

    A row of no more different weights than that has these, the last one again and again.

    Args:
        weight: (rows, columns).
        costs: (columns,) of a squared error.
    """
    rows = weight.double().cpu().numpy()
    weights = (costs / costs.mean()).cpu().numpy()
    found = np.stack([_centres(row, weights, 2**bits, seed) for row in rows])
    return torch.from_numpy(found).to(weight.device, torch.float32)


def _centres(row: np.ndarray, costs: np.ndarray, count: int, seed: int) -> np.ndarray:
    distinct = np.unique(row)
    if len(distinct) <= count:
        return np.pad(distinct, (0, count - len(distinct)), mode="edge")
    even = np.linspace(row.min(), row.max(), count)[:, None]
    means = KMeans(
        count,
        init=even if count <= FEW else "k-means++",
        n_init="auto",
        max_iter=100,
        tol=1e-6,
        random_state=seed,
    ).fit(row[:, None], sample_weight=costs)
    return np.sort(means.cluster_centers_[:, 0])


def rounding(book: Tensor) -> Callable[[Tensor, int], Tensor]:
    """What `compensated` takes for values (rows, levels) of each row."""
    book = book.double()

    def nearest(column: Tensor, _: int) -> Tensor:
        codes = (book - column[:, None]).abs().argmin(1, keepdim=True)
        return book.gather(1, codes)[:, 0]

    return nearest
