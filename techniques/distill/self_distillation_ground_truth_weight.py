"""Self-distillation with a weight for the ground truth."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tasks.losses import IGNORED, precise
from techniques.distill.teacher import both_logits


class GroundTruthWeight:
    """L = α·‖p − one-hot‖²/C + (1 − α)·‖p − q‖²/C, p and q the softmax of the model's and the
    teacher's logits of C classes.

    In self-distillation the teacher is the same model trained before, itself on such a loss, the
    first with α = 1, which needs no teacher. Of kernel ridge regression the fits of a whole chain
    of these, and the α that is best, have a closed form: `study.analyses.self_distillation`.

    Minimiser: p = α·one-hot + (1 − α)·q. Range: from α·(1 − α)·‖one-hot − q‖²/C to at most 2/C. At
    saturated logits it is constant and its gradient 0, even where they are wrong. It needs all
    probabilities of both models, so it is not fused with the classifier.

    Args:
        alpha: α, weight of the labels; 0.6 as in the example of the code's README (its default is
            1, no distillation). 0 is distillation alone.

    Shapes: `logits` and the teacher's (..., classes) and integer `labels` (...) to losses (...), 0
    where a label is −100.

    The code adds 1e-4·Σ‖w‖ over its parameters, not squared; here that is left to weight decay.

    Raises:
        ValueError: for an α outside [0, 1].
        UsageError: for an α below 1 without `callbacks.teacher`, or with one of other logits.

    Source: "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by
    Self-Distillation", arXiv 2102.13088; https://github.com/Kennethborup/self_distillation,
    `self_distiller.py` (`training_step`).
    """

    def __init__(self, alpha: float = 0.6) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: must be between 0 and 1, got {alpha}")
        self.alpha = alpha

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        p, labels = precise(outputs["logits"]).softmax(-1), batch["labels"]
        one_hot = F.one_hot(labels.clamp(min=0), p.shape[-1]).to(p.dtype)
        losses = self.alpha * (p - one_hot).square().mean(-1)
        if self.alpha < 1:
            q = both_logits(outputs, batch)[1].softmax(-1)
            losses = losses + (1 - self.alpha) * (p - q).square().mean(-1)
        return losses.masked_fill(labels == IGNORED, 0.0)
