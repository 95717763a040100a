"""Removing the hidden units that were marked and regularised."""

from typing import TYPE_CHECKING

from techniques.post.hidden import hidden_units, remove
from training.errors import UsageError

if TYPE_CHECKING:
    from training.run import Run


class RegularizeThenPrune:
    """Removes the hidden units that `techniques.reparam.regularize_then_prune` has marked, and the
    marks with them: the weights become smaller.

    Raises:
        UsageError: when it is applied, for a model without marks.

    Source: see `techniques.penalty.regularize_then_prune`.
    """

    def __call__(self, run: "Run") -> None:
        """Prune the run's model."""
        layers = {name: hidden.out for name, hidden in hidden_units(run.model).items()}
        found = {name: layer._buffers.get("removed") for name, layer in layers.items()}
        gone = {name: removed for name, removed in found.items() if removed is not None}
        if not gone:
            raise UsageError("post.regularize_then_prune: reparam has marked no hidden units")
        remove(run, gone)
        for name in gone:
            del layers[name].removed
