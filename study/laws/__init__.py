"""Scaling laws, one a file, for `assay fit` and recipes' analyses.

A law's `log_loss` takes its coordinates by name, tensors of shape (laws, 1), and the columns of the
data by name, float64 tensors of shape (rows,), and gives log L of shape (laws, rows). Positive
coefficients are fitted as their logarithms, which the law calls `log_...`.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from training.errors import UsageError, nearest

Columns = dict[str, Tensor]
Coordinates = dict[str, Tensor]

WEIGHT = "weight_"
"""What the columns of domains' weights begin with."""


@dataclass(frozen=True)
class Law:
    """A law of the loss.

    Args:
        formula: of L, as people write it.
        source: paper and what decided how it is fitted.
        columns: that the data must have beside `loss`.
        log_loss: log L of coordinates and columns.
        starts: by coordinate, where a fit may start: all combinations are tried.
        exponents: coordinates that are not logarithms of coefficients, in the order to be shown.
        domains: of a law of a mixture of data, the law of domains by name.
    """

    formula: str
    source: str
    columns: tuple[str, ...]
    log_loss: Callable[[Coordinates, Columns], Tensor]
    starts: dict[str, tuple[float, ...]]
    exponents: tuple[str, ...]
    domains: "Callable[[tuple[str, ...]], Law] | None" = None

    def over(self, columns: Iterable[str]) -> "Law":
        """The law that is fitted to such columns: itself, or of a mixture that of the domains which
        have a column `weight_...`."""
        if self.domains is None:
            return self
        return self.domains(tuple(c.removeprefix(WEIGHT) for c in columns if c.startswith(WEIGHT)))


def names() -> list[str]:
    """All laws."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")


def find(name: str) -> Law:
    """A law by its name.

    Raises:
        UsageError: when there is none.
    """
    if name not in names():
        raise UsageError(f"law: no '{name}'{nearest(name, names())}")
    return importlib.import_module(f"study.laws.{name}").LAW
