"""How well a linear classifier reads the classes off a model's features."""

from typing import TYPE_CHECKING

import numpy as np

from study.probes.representations import Representations, represent
from training.errors import UsageError

if TYPE_CHECKING:
    from training.run import Run


class LinearProbe:
    """Records `probe/linear_accuracy` at each evaluation: scikit-learn's `LogisticRegression`,
    fitted to the model's features of training samples without augmentation, on validation samples.

    The features are those before the head or the projection, frozen, and read as they are: scaled
    to a variance of 1, features that have all but collapsed would be as good as those of an
    untrained model. No random number is drawn.

    Args:
        samples: of the training set, evenly spaced; null: all. Those of validation are
            `trainer.eval_samples`.
        strength: of the L2 penalty; scikit-learn's 1/C.
        max_iter: steps of the solver, L-BFGS, at most.

    Raises:
        ValueError: for settings that are not positive.
        UsageError: at the start, for a task without labels or a model without features.

    Source: the evaluation of "VICReg", arXiv 2105.04906, and others, there by SGD;
    https://github.com/facebookresearch/vicreg, `evaluate.py`.
    """

    def __init__(
        self, samples: int | None = 4096, strength: float = 1.0, max_iter: int = 1000
    ) -> None:
        given = {"samples": samples, "strength": strength, "max_iter": max_iter}
        for name, value in given.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        self.samples, self.strength, self.max_iter = samples, strength, max_iter

    def on_fit_start(self, run: "Run") -> None:
        """Try a sample."""
        labels = represent(run, run.task.train, 1).labels
        if labels is None or labels.is_floating_point() or labels.ndim != 1:
            raise UsageError("callbacks: a linear probe needs a task with one class a sample")

    def on_eval_end(self, run: "Run") -> None:
        """Fit and score."""
        from sklearn.linear_model import LogisticRegression

        samples = run.config["trainer"]["eval_samples"]
        x, y = _labelled(represent(run, run.task.train, self.samples))
        x_held_out, y_held_out = _labelled(represent(run, run.task.validation, samples))
        probe = LogisticRegression(C=1 / self.strength, max_iter=self.max_iter).fit(x, y)
        run.record({"probe/linear_accuracy": float(probe.score(x_held_out, y_held_out))})


def _labelled(found: Representations) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the samples whose label is known."""
    assert found.labels is not None
    known = found.labels >= 0
    return found.features[known].numpy(), found.labels[known].numpy()
