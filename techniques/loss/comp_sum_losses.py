"""Comp-sum losses: the family of cross-entropy and of the mean absolute error."""

from typing import Any

from torch import Tensor

from techniques.loss.cut_cross_entropy import fused_cross_entropy


class CompSumLoss:
    """L = ((Σₖ e^(zₖ − z_y))^(1 − τ) − 1) / (1 − τ), and its limit log Σₖ e^(zₖ − z_y) at τ = 1.

    With p the softmax probability of the label, (1 − p^(τ − 1)) / (τ − 1): τ = 0 is the
    sum-exponential loss 1/p − 1, τ = 1 cross-entropy, τ between 1 and 2 the generalised
    cross-entropy with q = τ − 1, and τ = 2 the mean absolute error 1 − p.

    Minimiser: probabilities proportional to P(k|x)^(1 / (2 − τ)) below τ = 2, all on the most
    probable class from there on. Range: [0, ∞) up to τ = 1, above it [0, 1 / (τ − 1)). It is
    computed from −log p, so at saturated logits it is exact; above τ = 1 it is 1 / (τ − 1) there
    where the label has lost and its gradient vanishes, at τ = 1 it grows as the logits do, and
    below it exponentially: where (1 − τ)·(−log p) is over 88 (709 in float64) the loss does not fit
    the format and is infinite, and its gradient is not finite.

    A function of the cross-entropy alone: of a language model with a linear `classifier` −log p
    comes from the fused kernel, and the logits are never made.

    The paper's smooth adversarial variant, which adds the largest change of the logits' differences
    in a ball around the input, is left out: its published constants could not be confirmed.

    Args:
        tau: τ, at least 0.

    Shapes: `logits` (..., classes), or `hidden` (..., dim), and integer `labels` (...) to losses
    (...), 0 where a label is −100.

    Raises:
        ValueError: when `tau` is negative.

    Source: "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", arXiv 2304.07288;
    no code of the authors is public, and of the paper only the abstract could be read. It names the
    members from τ = 1 on; the formula is the one that has them all.
    """

    def __init__(self, tau: float) -> None:
        if tau < 0:
            raise ValueError(f"tau: must not be negative, got {tau}")
        self.tau = tau

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        loss = fused_cross_entropy(outputs, batch)
        if self.tau == 1:
            return loss
        return ((1 - self.tau) * loss).expm1() / (1 - self.tau)
