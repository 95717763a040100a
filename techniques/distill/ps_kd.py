"""PS-KD: the model's own predictions of the epoch before soften its targets."""

from typing import Any

from torch import Tensor, nn

from tasks.losses import IGNORED, precise
from techniques.distill.memory import Recent, note, recalled


class PSKD(nn.Module):
    """−Σ_c t_c·log p_c with t = (1 − α_e)·one-hot + α_e·p⁻ and α_e = α_T·(e + 1)/T.

    p = softmax(logits), p⁻ the same of this sample one epoch before, a constant, and e its epoch of
    T, from 0. In the first there is no p⁻ and t is one-hot. In evaluation mode it is cross-entropy.

    Its minimiser is p = t. Its range is from the entropy of t to infinity. At
    saturated logits it grows linearly in them and its gradient, p − t, stays within [−1, 1].

    The logits of the epoch before are kept for each sample by `techniques.distill.memory`, which
    the overlay adds; a language model's would be too many.

    Args:
        alpha: α_T, the weight of the past predictions in the last epoch; 0.8 as in the code.

    Shapes: `logits` (batch, classes) and integer `labels` (batch,) to losses (batch,), 0 where a
    label is −100.

    Raises:
        ValueError: for an α_T outside [0, 1]; at the first step, without the callback or on a task
            that is no classification.

    Source: "Self-Knowledge Distillation with Progressive Refinement of Targets", arXiv 2006.12000;
    https://github.com/lgcnsai/PS-KD-Pytorch, `main.py`, `loss/pskd_loss.py`.
    """

    def __init__(self, alpha: float = 0.8) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: must be between 0 and 1, got {alpha}")
        self.alpha = alpha
        self.recent: Recent = {}

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        logits, labels = outputs["logits"], batch["labels"]
        log_p = precise(logits).log_softmax(-1)
        hard = -log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        if self.training:
            past, known = recalled(batch, epochs=1)
            note(self.recent, outputs, batch)
            if past.shape == logits.shape:
                soft = -(past.to(log_p.dtype).softmax(-1) * log_p).sum(-1)
                progress = (batch["epoch"].to(log_p.dtype) + 1) / batch["epochs"]
                weight = self.alpha * progress * known
                hard = (1 - weight) * hard + weight * soft
        return hard.where(labels != IGNORED, 0.0)
