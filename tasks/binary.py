"""Two classes: a model's margins, and metrics that are no mean over samples."""

from typing import Any

from torch import Tensor

from tasks.losses import precise


def margins(outputs: Any) -> Tensor:
    """f₁ − f₀ of two-class `logits` (..., 2): (...), in at least float32. Class 1 is predicted
    where it is positive; its probability is σ(f₁ − f₀).

    Raises:
        ValueError: for another number of classes.
    """
    logits = outputs["logits"]
    if logits.shape[-1] != 2:
        raise ValueError(f"task.loss: for two classes, the model gives {logits.shape[-1]} outputs")
    first, second = precise(logits).unbind(-1)
    return second - first


def predictions(outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Each sample's `labels` and the class `predicted`, for `metrics`."""
    return {"labels": batch["labels"], "predicted": outputs["logits"].argmax(-1)}


def metrics(rows: dict[str, Tensor]) -> dict[str, float]:
    """`f1` of class 1, `balanced_accuracy`, the mean of both classes' recalls, and `gmean`, the
    square root of their product; a class that does not occur has a recall of 0."""
    from sklearn.metrics import f1_score, recall_score

    labels, predicted = rows["labels"].numpy(), rows["predicted"].numpy()
    options: Any = {"labels": [0, 1], "average": None, "zero_division": 0.0}
    recalls: Any = recall_score(labels, predicted, **options)
    f1: Any = f1_score(labels, predicted, **options)
    return {
        "f1": float(f1[1]),
        "balanced_accuracy": float(recalls.mean()),
        "gmean": float(recalls.prod() ** 0.5),
    }
