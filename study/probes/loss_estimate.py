"""How well a selection's losses stand for those of the whole training set."""

from typing import TYPE_CHECKING

import numpy as np

from techniques.data.selection import Selection, over, sample_losses
from training.errors import UsageError
from training.trained import model_of

if TYPE_CHECKING:
    from training.run import Run


class LossEstimate:
    """Records once, at the start, how far the mean of w·ℓ over the m samples chosen, with their
    weights, lies from the mean loss ℓ̄ of the whole set: `probe/loss_error`, |Σ w·ℓ/m − ℓ̄|/ℓ̄, and
    `probe/loss_standard_error`, std(w·ℓ)/(√m·ℓ̄), what the error of independent draws is expected to
    be (root mean square), far less a matter of luck than that of one choice.

    The losses are those of another run's model, and the choice that of the last selection in
    `data.transforms`.

    Args:
        of: that run's folder.
        trust: import what its configuration names from whatever package.

    Raises:
        UsageError: at the start, without a selection, or for a folder without a checkpoint.
    """

    def __init__(self, of: str, trust: bool = False) -> None:
        self.of, self.trust = of, trust

    def on_fit_start(self, run: "Run") -> None:
        """Measure."""
        parts = [getattr(part, "selection", None) for part in run.transforms.values()]
        selections = [part for part in parts if isinstance(part, Selection)]
        if not selections:
            raise UsageError("callbacks: there is no selection in data.transforms to measure")
        last = selections[-1]
        model, _ = model_of(self.of, run.accelerator, "callbacks: of", self.trust)
        losses = over(sample_losses(model, run.task), last.dataset, run.task, run.accelerator)
        found = errors(losses, last.kept, last.weights)
        run.record({"probe/loss_error": found[0], "probe/loss_standard_error": found[1]})


def errors(losses: np.ndarray, kept: np.ndarray, weights: np.ndarray | None) -> tuple[float, float]:
    """Error and standard error of the mean of weights · losses[kept], relative to that of losses
    (samples,). Shapes: `kept` and `weights` (chosen,); of one sample the second is 0."""
    chosen = (losses[kept] if weights is None else losses[kept] * weights) / losses.mean()
    deviation = chosen.std(ddof=1) if len(chosen) > 1 else 0.0
    return float(abs(chosen.mean() - 1)), float(deviation / len(chosen) ** 0.5)
