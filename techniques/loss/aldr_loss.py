"""Label-distributionally robust losses: LDR-KL, and ALDR-KL with a temperature for each sample."""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.losses import IGNORED, precise
from training.errors import UsageError


class LDRLoss:
    """L = λ·log (1/K) Σₖ exp(gₖ / λ), with gₖ = sₖ − s_y + c for a class k that is not the label y,
    and g_y = 0: the largest Σₖ pₖ·gₖ − λ·KL(p ‖ 1/K) over distributions p of the K classes.

    The scores are positive and of mean 1: s = K·softplus(z) / Σ softplus(z) of logits z. λ → 0 is
    the largest margin violation (Crammer and Singer's), λ → ∞ the mean of the violations.

    Minimiser: with c = 0 and P(k|x) near enough to uniform, λ·log P(k|x) + const; scores cannot be
    negative, so those of improbable classes are 0. Range: from λ·log of (1 + (K − 1)·e^((c − K)/λ))
    / K, negative, where the label has all of the score, to λ·log of (1 + (K − 2)·e^(c/λ) +
    e^((c + K)/λ)) / K, where another class has. At saturated logits the loss stays in that range
    and its gradient vanishes, as only ratios of softplus(z) count; these are taken in logarithms,
    so that logits that are all very negative give no 0/0 (in the authors' code they do).

    Every score depends on all logits before the logarithm, so it is no function of the
    cross-entropy, and no fused kernel computes it.

    Args:
        margin: c, at least 0; 0.1 as in the authors' experiments (2 in their class).
        temperature: λ, positive; 10 as in their experiments, tuned in 0.1, 1 and 10.

    Shapes: `logits` (..., classes) and integer `labels` (...) to losses (...), 0 where a label is
    −100.

    Raises:
        ValueError: for a negative margin or a temperature that is not positive.

    Source: "Label Distributionally Robust Losses for Multi-class Classification: Consistency,
    Robustness and Adaptivity", arXiv 2112.14869;
    https://github.com/Optimization-AI/ICML2023_LDR, `loss.py` (`LDRLoss_V1`) and `experiment.py`.
    """

    def __init__(self, margin: float = 0.1, temperature: float = 10.0) -> None:
        _check(margin, temperature)
        self.margin, self.temperature = margin, temperature

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        scores = positive_scores(precise(outputs["logits"]))
        return robust_loss(scores, batch["labels"], self.margin, self.temperature)


class ALDRLoss(nn.Module):
    """LDR-KL whose temperature is lower for a sample the more certain the model is of it:

        L = λ·log (1/K) Σₖ exp(gₖ / λ) − α·log K / (2·λ₀)·(λ − λ₀)²

    The largest L has λ = λ₀ − λ₀·KL(p ‖ 1/K) / (α·log K), where p depends on λ itself. As in the
    authors' code each visit of a sample makes one step of this fixed point: p = softmax(s / λ′),
    with λ′ from the sample's last visit (λ₀ at first), 10⁻⁵ added to each probability, and neither
    margin nor label; no gradient flows through λ. Noisy samples, of which the model is uncertain,
    keep λ near λ₀. λ is always above λ₀·(1 − 1/α). In evaluation λ′ is λ₀ and nothing is kept.

    The scores are s = K·z / Σ|z|, or with `softplus` those of `LDRLoss`.

    Minimiser, for a fixed λ and c = 0: λ·log P(k|x) + const where a vector of scores is of that
    form, else the nearest in risk. Range: scores differ by at most K, so without the last term,
    at most λ₀·log K / (2·α), L is from λ·log of (1 + (K − 1)·e^((c − K)/λ)) / K to that with c + K.
    At saturated logits it stays there and its gradient vanishes, as the size of the logits does not
    count; of logits that are all 0 the direction is undefined, and the gradient about 10¹² (the
    authors' code gives NaN).

    Which samples a batch has is its `index`; their λ are part of the checkpoint, and all processes
    know those of all. No fused kernel computes it, as of `LDRLoss`.

    Args:
        margin: c, at least 0; 0.1 as in the authors' experiments (1 in their class).
        temperature: λ₀, positive; 10 as in their experiments.
        alpha: α, above 1; 2 as in their experiments.
        softplus: make logits positive first; false but for CIFAR-100 in their experiments.

    Shapes: `logits` (batch, classes) and integer `labels` (batch,) to losses (batch,), 0 where a
    label is −100.

    Raises:
        ValueError: for a negative margin, a temperature that is not positive, or α of at most 1.
        UsageError: for labels that are not one per sample.

    Source: as of `LDRLoss`, `loss.py` (`ALDRLoss_V1`) and `experiment.py`.
    """

    def __init__(
        self,
        margin: float = 0.1,
        temperature: float = 10.0,
        alpha: float = 2.0,
        softplus: bool = False,
    ) -> None:
        super().__init__()
        _check(margin, temperature)
        if alpha <= 1:
            raise ValueError(f"alpha: must be above 1, got {alpha}")
        self.margin, self.temperature, self.alpha = margin, temperature, alpha
        self.softplus = softplus
        # No buffer: it grows, and DDP would broadcast it before every forward.
        self.temperatures = torch.empty(0, dtype=torch.float64)

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        labels = batch["labels"]
        if labels.ndim != 1:
            raise UsageError(
                f"task.loss: aldr_loss needs one label per sample, got {tuple(labels.shape)}"
            )
        logits = precise(outputs["logits"])
        classes = logits.shape[-1]
        if self.softplus:
            scores = positive_scores(logits)
        else:
            scores = classes * F.normalize(logits, p=1.0, dim=-1)
        index = batch["index"].cpu() if self.training and "index" in batch else None
        temperature = self.adapt(scores.detach(), index)
        weight = self.alpha * math.log(classes) / self.temperature
        regulariser = weight / 2 * (temperature - self.temperature).square()
        loss = robust_loss(scores, labels, self.margin, temperature) - regulariser
        return loss.masked_fill(labels == IGNORED, 0.0)

    @torch.no_grad()
    def adapt(self, scores: Tensor, index: Tensor | None) -> Tensor:
        """λ of each row of scores; with `index`, from what is kept of those samples, and kept."""
        start, classes = self.temperature, scores.shape[-1]
        previous = torch.full((len(scores),), start, dtype=torch.float64)
        if index is not None:
            self._grow(index)
            previous = self.temperatures[index]
        p = (scores / previous.to(scores)[:, None]).softmax(-1) + 1e-5
        p = p / p.sum(-1, keepdim=True)
        divergence = (p * (classes * p).log()).sum(-1)
        temperature = start - start * divergence / (self.alpha * math.log(classes))
        if index is not None:
            self._keep(index, temperature.to("cpu", torch.float64))
        return temperature

    def _keep(self, index: Tensor, temperatures: Tensor) -> None:
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (index, temperatures))
            index, temperatures = (torch.cat(part) for part in zip(*parts))
            self._grow(index)
        self.temperatures[index] = temperatures

    def _grow(self, index: Tensor) -> None:
        more = int(index.max()) + 1 - len(self.temperatures)
        if more > 0:
            new = self.temperatures.new_full((more,), self.temperature)
            self.temperatures = torch.cat([self.temperatures, new])

    def get_extra_state(self) -> Tensor:
        """λ of every sample seen, by index."""
        return self.temperatures

    def set_extra_state(self, state: Tensor) -> None:
        """Take those of a checkpoint."""
        self.temperatures = state


def positive_scores(logits: Tensor) -> Tensor:
    """K·softplus(z) / Σ softplus(z) over the last dimension, of K classes."""
    low = logits.clamp(max=-15.0)  # there log softplus(z) = z − eᶻ/2 to within 1e-14
    high = F.softplus(logits.clamp(min=-15.0)).log()
    logarithms = torch.where(logits < -15.0, low - low.exp() / 2, high)
    return logits.shape[-1] * logarithms.softmax(-1)


def robust_loss(
    scores: Tensor, labels: Tensor, margin: float, temperature: float | Tensor
) -> Tensor:
    """λ·log of the mean of exp((sₖ − s_y + c·1[k ≠ y]) / λ): (..., classes) to (...)."""
    own = labels.clamp(min=0)[..., None]
    gaps = (scores - scores.gather(-1, own) + margin).scatter(-1, own, 0.0)
    scale = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    mean = (gaps / scale).logsumexp(-1) - math.log(scores.shape[-1])
    return (temperature * mean).masked_fill(labels == IGNORED, 0.0)


def _check(margin: float, temperature: float) -> None:
    if margin < 0:
        raise ValueError(f"margin: must not be negative, got {margin}")
    if temperature <= 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
