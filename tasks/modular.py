"""Modular arithmetic, the task on which grokking was found."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from tasks import losses
from tasks.arrays import as_dataset
from training.errors import UsageError, nearest

OPERATIONS = ("add", "subtract", "multiply", "divide")


class Modular:
    """Given "a ∘ b =", predict a ∘ b mod p, over all pairs ("Grokking", arXiv 2201.02177).

    Tokens are the numbers 0 to p − 1, then ∘, then =. Only the position of "=" has a label.

    Args:
        modulus: p, a prime for `"divide"`; 97 as in the paper.
        operation: `"add"`, `"subtract"`, `"multiply"` or `"divide"` (by b ≠ 0).
        train_fraction: of the pairs, a random draw that is the same for every run; the rest is for
            validation.

    Raises:
        UsageError: for an unknown operation, a modulus or fraction that leaves nothing, or a
            division by a modulus that is no prime.
    """

    unit = "samples"

    def __init__(
        self, *, modulus: int = 97, operation: str = "add", train_fraction: float = 0.5
    ) -> None:
        if operation not in OPERATIONS:
            hint = nearest(operation, OPERATIONS)
            raise UsageError(f"task.operation: no '{operation}'{hint}")
        if modulus < 2:
            raise UsageError(f"task.modulus: must be at least 2, got {modulus}")
        if operation == "divide" and any(modulus % i == 0 for i in range(2, modulus)):
            raise UsageError(f"task.modulus: division needs a prime, got {modulus}")
        equations = _equations(modulus, operation)
        order = np.random.default_rng(0).permutation(len(equations))
        cut = round(train_fraction * len(equations))
        if not 0 < cut < len(equations):
            raise UsageError(
                f"task.train_fraction: {train_fraction} of {len(equations)} pairs leaves one split "
                "empty"
            )
        self.train: Dataset = as_dataset({"equation": equations[order[:cut]]})
        self.validation: Dataset = as_dataset({"equation": equations[order[cut:]]})
        self.dims = {"vocab_size": modulus + 2, "context_length": 4}

    def count(self, batch: dict[str, Any]) -> int:
        """Equations in a batch."""
        return len(batch["input_ids"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`input_ids` (batch, 4) and `labels` (batch, 4), −100 but for the last."""
        equation = rows["equation"]
        labels = torch.full((len(equation), 4), losses.IGNORED)
        labels[:, 3] = equation[:, 4]
        return {"input_ids": equation[:, :4].contiguous(), "labels": labels}

    loss = staticmethod(losses.cross_entropy)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Whether each result was predicted."""
        return {"accuracy": losses.correct(outputs, batch)}


def _equations(p: int, operation: str) -> np.ndarray:
    """Rows a, ∘, b, =, result of every pair."""
    a, b = (axis.reshape(-1) for axis in np.mgrid[0:p, 0:p])
    if operation == "divide":
        a, b = a[b != 0], b[b != 0]
        # a / b = c where c · b = a; b^(p−2) is the inverse of b (Fermat).
        inverse = np.array([pow(int(x), p - 2, p) for x in range(p)])
        result = a * inverse[b] % p
    else:
        result = {"add": a + b, "subtract": a - b, "multiply": a * b}[operation] % p
    signs = np.full_like(a, p), np.full_like(a, p + 1)
    return np.stack([a, signs[0], b, signs[1], result], axis=1)
