"""Knowledge distillation: the labels and a teacher's softened probabilities."""

from typing import Any

from torch import Tensor

from tasks.losses import IGNORED
from techniques.distill.teacher import both_logits, label_log_p


class Hinton:
    """L = α·CE(labels, p) + (1 − α)·T²·KL(softmax(t/T) ‖ softmax(s/T)).

    s and t are the model's and the teacher's logits, p = softmax(s). T² keeps the soft term's
    gradients of one size as T changes. The KL needs all logits of both models, so a loss fused
    with the classifier does not apply.

    Minimiser: at T = 1 p = α·onehot + (1 − α)·softmax(t); otherwise α = 0 has s = t up to a
    constant, and α = 1 is cross-entropy, whose infimum 0 is not attained. Range: [0, ∞). At
    saturated logits it grows linearly in them, and each gradient is at most α + (1 − α)·T.

    Args:
        temperature: T; 4 as in cls_KD.
        alpha: α, weight of the labels; 0.5 as in cls_KD.

    Shapes: `logits` and the teacher's (..., classes) and integer `labels` (...) to losses (...), 0
    where a label is −100.

    Raises:
        ValueError: for a temperature that is not positive or an α outside [0, 1].
        UsageError: without `callbacks.teacher`, or with one of other logits.

    Source: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2;
    https://github.com/yzd-v/cls_KD, `mmcls/models/dis_losses/kd.py` (whose cross-entropy with the
    teacher is this KL plus a constant).
    """

    def __init__(self, temperature: float = 4.0, alpha: float = 0.5) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: must be in [0, 1], got {alpha}")
        self.temperature, self.alpha = temperature, alpha

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        student, teacher = both_logits(outputs, batch)
        labels, t = batch["labels"], self.temperature
        hard = -label_log_p(student.log_softmax(-1), labels)
        log_p, log_q = (student / t).log_softmax(-1), (teacher / t).log_softmax(-1)
        soft = (log_q.exp() * (log_q - log_p)).sum(-1).masked_fill(labels == IGNORED, 0.0)
        return self.alpha * hard + (1 - self.alpha) * t**2 * soft
