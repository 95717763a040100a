"""Average thresholded confidence: the accuracy on shifted data without labels."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from techniques.post.held_out import check_share, halves, said
from techniques.post.temperature import fitted
from training.components import call, factory

if TYPE_CHECKING:
    from training.run import Run


class ATC:
    """Predicts the accuracy on unlabelled data from a threshold on labelled source data: t is such
    that as many source samples have a score of at most t as are wrong, and the accuracy elsewhere
    is the share of samples with a score of at least t. The score is the largest probability
    (`atc_mc`) or the negative entropy (`atc_ne`), of probabilities whose temperature is fitted to
    the source.

    Beside it the paper's simpler ways: `ac`, the average confidence; `doc`, the source's accuracy
    less the difference of confidences; `im`, the source's accuracy with importance weights by ten
    bins of confidence. The model stays as it is.

    The source is a share of the validation set, the targets the rest of it in each of the shifts.
    Of every shift `post/atc_accuracy_prediction/<shift>/accuracy` is recorded and, in its place,
    each prediction; as `/error/<prediction>` the mean over shifts of the absolute difference.

    Args:
        shifts: by name a component that is a transform of a dataset, as `tasks.corruptions`.
        share: of the validation set, the source.
        seed: of the choice of samples.

    Raises:
        ValueError: for no shifts, or a share outside (0, 1).
        UsageError: for a shift that is no component.

    Source: "Leveraging Unlabeled Data to Predict Out-of-Distribution Performance", arXiv
    2201.04234; https://github.com/saurabhgarg1996/ATC_code, `ATC_helper.py`,
    `predict_acc_helper.py` and, for the temperature, `notebooks/ATC_example.ipynb`. The paper's t
    has as many scores below it as are wrong; in the code, which is followed, one of these is t
    itself, so that a prediction is higher by one source sample's share. Where none is wrong t is
    −∞, in the code 0.
    """

    def __init__(self, shifts: dict[str, Any], share: float = 0.5, seed: int = 0) -> None:
        if not shifts:
            raise ValueError("shifts: expected at least one")
        check_share(share)
        where = "post.atc_accuracy_prediction.shifts"
        self.shifts = {name: factory(node, f"{where}.{name}") for name, node in shifts.items()}
        self.share, self.seed = share, seed

    def __call__(self, run: "Run") -> None:
        """Predict, and compare with the labels."""
        source, rest = halves(run, self.share, self.seed)
        logits, labels = said(run, source)
        t = fitted(logits, labels)
        known = (logits / t).softmax(-1).numpy()
        correct = (known.argmax(-1) == labels.numpy()).astype(float)
        found: dict[str, float] = {}
        errors: dict[str, list[float]] = {}
        for name, shift in self.shifts.items():
            moved = call(shift, f"post.atc_accuracy_prediction.shifts.{name}", rest)
            logits, labels = said(run, moved)
            accuracy = (logits.argmax(-1) == labels).double().mean().item()
            found[f"{name}/accuracy"] = accuracy
            for way, value in predictions(known, correct, _probabilities(logits / t)).items():
                found[f"{name}/{way}"] = value
                errors.setdefault(way, []).append(abs(value - accuracy))
        found |= {f"error/{way}": float(np.mean(values)) for way, values in errors.items()}
        run.record({f"post/atc_accuracy_prediction/{k}": v for k, v in found.items()})


def predictions(source: np.ndarray, correct: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The accuracy on the target by each of the ways.

    Args:
        source: probabilities (n, classes).
        correct: of the source's samples, 1 or 0 (n,).
        target: probabilities (m, classes).
    """
    confidences = source.max(-1), target.max(-1)
    gap = confidences[0].mean() - confidences[1].mean()
    weights = importance(*confidences)
    return {
        "atc_mc": thresholded(*confidences, correct),
        "atc_ne": thresholded(negative_entropy(source), negative_entropy(target), correct),
        "ac": float(confidences[1].mean()),
        "doc": float(correct.mean() - gap),
        "im": float((weights * correct).sum() / weights.sum()),
    }


def thresholded(source: np.ndarray, target: np.ndarray, correct: np.ndarray) -> float:
    """The share of the target's scores that are at least the source's score of rank w, w being how
    many of its samples are wrong."""
    wrong = len(correct) - int(correct.sum())
    threshold = np.sort(source)[wrong - 1] if wrong else -np.inf
    return float((target >= threshold).mean())


def negative_entropy(p: np.ndarray) -> np.ndarray:
    """Σ p·log p over the last axis."""
    from scipy.special import entr

    return -entr(p).sum(-1)


def importance(source: np.ndarray, target: np.ndarray, bins: int = 10) -> np.ndarray:
    """How much more often than the source the target has the confidence of each source sample."""
    edges = np.linspace(0, 1, bins + 1)
    shares = [np.histogram(part, edges)[0] / len(part) for part in (source, target)]
    own = np.clip(np.digitize(source, edges) - 1, 0, bins - 1)
    return shares[1][own] / shares[0][own]


def _probabilities(logits: Tensor) -> np.ndarray:
    return torch.softmax(logits, -1).numpy()
