"""How far a classifier's confidence can be trusted."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from techniques.callback import probing

if TYPE_CHECKING:
    from training.run import Run


class Calibration:
    """Records after the last step, over the whole validation set, the expected calibration error as
    `probe/ece` and the area under the risk-coverage curve as `probe/aurc`. Lower is better.

    Args:
        bins: of confidence, equally wide; 10 as in the code named below.

    Raises:
        ValueError: for fewer than one bin.

    Source: the measurements of "Self-Knowledge Distillation with Progressive Refinement of
    Targets", arXiv 2006.12000; https://github.com/lgcnsai/PS-KD-Pytorch, `utils/metric.py`, which
    multiplies them by 100 and 1000.
    """

    def __init__(self, bins: int = 10) -> None:
        if bins < 1:
            raise ValueError(f"bins: must be at least 1, got {bins}")
        self.bins = bins

    def on_eval_end(self, run: "Run") -> None:
        """Measure when training is over."""
        if run.step < run.max_steps:
            return
        found = []
        for batch, outputs in probing.validation(run):
            confidence, predicted = outputs["logits"].double().softmax(-1).max(-1)
            found.append(torch.stack([confidence, (predicted == batch["labels"]).double()]))
        confidence, correct = torch.cat(found, 1).cpu()
        run.record(
            {
                "probe/ece": calibration_error(confidence, correct, self.bins),
                "probe/aurc": risk_coverage(confidence, correct),
            }
        )


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> float:
    """Σ over bins of |accuracy − mean confidence|·share of the samples; a bin is (low, high]."""
    numbers = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=confidence.dtype).index_add(0, numbers, correct - confidence)
    return (gaps.abs().sum() / len(confidence)).item()


def risk_coverage(confidence: Tensor, correct: Tensor) -> float:
    """The mean, over k, of the error among the k most confident samples."""
    wrong = 1 - correct[confidence.argsort(descending=True, stable=True)]
    counts = torch.arange(1, len(wrong) + 1, dtype=wrong.dtype)
    return (wrong.cumsum(0) / counts).mean().item()
