"""Locally typical sampling."""

import torch
from torch import Tensor


class TypicalSampling:
    """Keeps the tokens whose information is nearest to what is expected: ordered by
    |−log p(y) − H|, with H the entropy of the next token's distribution, the smallest set whose
    mass reaches τ; all others get −∞.

    Tokens as near as the last of them are kept too, as in the authors' code. At τ = 1 nothing is
    left out; as τ → 0 the most typical token is left, which need not be the most likely one.

    Args:
        mass: τ, in (0, 1]; 0.9 as in the authors' code. The paper has 0.2 and 0.95.

    Shapes: input_ids (batch, length), which it does not read, and scores (batch, vocabulary) to
    scores, as `transformers` calls its logits processors. −∞ stays −∞.

    Raises:
        ValueError: for a mass outside (0, 1].

    Source: "Locally Typical Sampling", arXiv 2202.00666;
    https://github.com/cimeister/typical-sampling, `src/transformers/generation_logits_process.py`.
    """

    def __init__(self, mass: float = 0.9) -> None:
        if not 0 < mass <= 1:
            raise ValueError(f"mass: must be in (0, 1], got {mass}")
        self.mass = mass

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
        p = log_p.exp()
        entropy = -(p * log_p).nansum(-1, keepdim=True)  # of p = 0 there is nothing to add
        distance = (log_p + entropy).abs()
        nearest = distance.sort(-1)
        reached = p.gather(-1, nearest.indices).cumsum(-1)
        last = (reached < self.mass).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        return scores.masked_fill(distance > nearest.values.gather(-1, last), -torch.inf)
