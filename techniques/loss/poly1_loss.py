"""Poly-1, the simplest PolyLoss."""

from typing import Any

from torch import Tensor

from techniques.loss.cut_cross_entropy import fused_cross_entropy


class Poly1Loss:
    """L = −log p + ε·(1 − p), with p the softmax probability of the label.

    Cross-entropy is the series Σⱼ (1 − p)ʲ / j; Poly-1 changes its first coefficient from 1 to
    1 + ε. ε = 0 is cross-entropy.

    Minimiser, for one label: p = 1. Range: [0, ∞) for ε ≥ −1. At saturated logits the second term
    is ε or 0 and has no gradient: cross-entropy's slope is left, −1 on the wrong side and 0 on the
    right one.

    A function of the cross-entropy alone: of a language model with a linear `classifier` it comes
    from the fused kernel, and the logits are never made.

    Args:
        epsilon: added to the first coefficient, at least −1. The paper tunes it for each task: 2
            for ImageNet classification, the default here, and −1 for detection and segmentation.

    Shapes: `logits` (..., classes) and integer `labels` (...) to losses (...), 0 where a label is
    −100.

    Raises:
        ValueError: when `epsilon` is below −1 (the loss would reward low probabilities).

    Source: "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions", arXiv
    2204.12511; https://github.com/abhuse/polyloss-pytorch, `polyloss.py` (whose default is 1).
    """

    def __init__(self, epsilon: float = 2.0) -> None:
        if epsilon < -1:
            raise ValueError(f"epsilon: must be at least -1, got {epsilon}")
        self.epsilon = epsilon

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        loss = fused_cross_entropy(outputs, batch)
        return loss - self.epsilon * (-loss).expm1()  # p = exp(−loss), also 0 at ignored labels
