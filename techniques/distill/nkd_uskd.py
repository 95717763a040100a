"""NKD and USKD: distillation whose non-target classes are normalised among themselves."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.losses import IGNORED, precise
from techniques.distill.teacher import both_logits, label_log_p
from techniques.loss.inf_cl_tiled_contrastive import processes
from training.errors import UsageError, nearest
from training.objective import predict


class NKD:
    """L = −log S_y − T_y·log S_y − γ·λ²·Σ_{i≠y} N(T)ᵢ·log N(S)ᵢ.

    S and T are the softmax of the model's and of the teacher's logits; N is that of the logits
    other than the label's, divided by λ, so that the non-target terms of both sum to 1. The first
    term is cross-entropy, the second the label's part of distillation. The teacher's whole
    distribution is needed, so a loss fused with the classifier does not apply.

    Minimiser: N(S) = N(T) and S_y → 1. The two are independent, the second is only approached.
    Range: (γ·λ²·H(N(T)), ∞), H the entropy. At saturated logits it grows linearly in them, and each
    gradient is at most 1 + T_y + γ·λ.

    Args:
        gamma: γ; 1.5, the code's for ImageNet (3.5 for CIFAR-100).
        temperature: λ; 1, the code's for ImageNet (3 for CIFAR-100).

    Shapes: `logits` and the teacher's (..., classes) and integer `labels` (...) to losses (...), 0
    where a label is −100.

    Raises:
        ValueError: for a negative γ or a temperature that is not positive.
        UsageError: without `callbacks.teacher`, or with one of other logits.

    Source: "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels", arXiv 2303.13005; https://github.com/yzd-v/cls_KD,
    `mmcls/models/dis_losses/nkd.py`, `mmcls/models/classifiers/distiller.py` (which adds the
    cross-entropy), `configs/distillers/`.
    """

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        if gamma < 0:
            raise ValueError(f"gamma: must be at least 0, got {gamma}")
        if temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.gamma, self.temperature = gamma, temperature

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        student, teacher = both_logits(outputs, batch)
        labels, t = batch["labels"], self.temperature
        target = label_log_p(teacher.log_softmax(-1), labels).exp()
        others = others_log_p(teacher / t, labels).exp()
        rest = (others * others_log_p(student / t, labels)).sum(-1)
        rest = rest.masked_fill(labels == IGNORED, 0.0)
        log_p = label_log_p(student.log_softmax(-1), labels)
        return -(1 + target) * log_p - self.gamma * t**2 * rest


class USKD(nn.Module):
    """L = −log S_y − α·P·log S_y − β·Σ_{i≠y} Zᵢ·log N(S)ᵢ + μ·CE(0.9·onehot + 0.1/C, W).

    NKD without a teacher. S is the softmax of the C logits, N that of those other than the label's,
    W that of a weak classifier on features from the middle of the model, all trained together. P =
    S_y² + 1 − mean(S_y²), over the batch of all processes, is the label's soft target. The others'
    is Zipf's law, Zᵢ ∝ 1/rank, where the rank is that of Wᵢ/(1 − W_y) + log Sᵢ/(1 − log S_y) among
    all classes, the largest first, and what the label's rank leaves is normalised. P and Z are
    constants. That the rank is by log S beside W, not by S, is as the authors' code has it.

    Minimiser, at constant P and Z: N(S) = Z and S_y → 1, which is only approached, and W = 0.9·
    onehot + 0.1/C. Range: (0, ∞). At saturated logits it grows linearly in them, and each gradient
    of the logits is at most 1 + α·P + β, with P < 2.

    Args:
        alpha: α; 1, the code's for ImageNet (0.1 for CIFAR-100).
        beta: β; 0.1, the code's for both.
        mu: μ; 0.005, the code's for ImageNet (0.1 for CIFAR-100).

    Shapes: `logits` (batch, C) and integer `labels` (batch,) to losses (batch,), 0 where a label is
    −100.

    Raises:
        ValueError: for a negative weight.
        UsageError: without `reparam.uskd` (`weak_classifier`).

    Source: as for `NKD`; `mmcls/models/dis_losses/uskd.py`.
    """

    head: nn.Linear

    def __init__(self, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005) -> None:
        super().__init__()
        for name, value in {"alpha": alpha, "beta": beta, "mu": mu}.items():
            if value < 0:
                raise ValueError(f"{name}: must be at least 0, got {value}")
        self.alpha, self.beta, self.mu = alpha, beta, mu
        self.features: Tensor | None = None

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        features, self.features = self.features, None
        if features is None:
            raise UsageError("task.loss: USKD needs reparam.uskd, which finds it features")
        logits, weak = precise(outputs["logits"]), precise(self.head(features))
        labels = batch["labels"]
        target, others = soft_labels(logits.detach(), weak.detach(), labels, self.training)
        log_w = weak.log_softmax(-1)
        smooth = -0.9 * label_log_p(log_w, labels) - 0.1 * log_w.mean(-1)
        losses = (
            -(1 + self.alpha * target) * label_log_p(logits.log_softmax(-1), labels)
            - self.beta * (others * others_log_p(logits, labels)).sum(-1)
            + self.mu * smooth
        )
        return losses.masked_fill(labels == IGNORED, 0.0)


def weak_classifier(
    model: nn.Module, batches: Iterator[dict[str, Any]], loss: Any, *, layer: str | None = None
) -> None:
    """Give a `USKD` loss a linear classifier and the features it is to classify.

    Features are a layer's outputs: of images (batch, channels, ...) the mean over positions, of
    tokens (batch, tokens, features) the first, which is the class token, as the authors do it.

    Args:
        model: only watched.
        batches, loss: of the run.
        layer: name of the layer; the authors take the end of the last stage but one of a
            convolutional network, and the block in the middle of a ViT.

    Raises:
        ValueError: for another loss, no layer or one the model does not have, or outputs of another
            shape.
    """
    if not isinstance(loss, USKD):
        raise ValueError("uskd: task.loss is not techniques.distill.nkd_uskd.USKD")
    layers = dict(model.named_modules())
    if layer is None:
        names = ", ".join(name for name in layers if name.count(".") == 1)
        raise ValueError(f"layer: name one from the middle of the model, of {names[:200]}")
    if layer not in layers:
        raise ValueError(f"layer: the model has no '{layer}'{nearest(layer, layers)}")

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if loss.training:
            loss.features = pooled(output)

    layers[layer].register_forward_hook(watch)
    training = model.training
    with torch.no_grad():
        classes = predict(model.eval(), next(batches))["logits"].shape[-1]
    model.train(training)
    features, loss.features = loss.features, None
    if features is None:
        raise ValueError(f"layer: the model does not use '{layer}'")
    loss.head = nn.Linear(features.shape[-1], classes, device=features.device)


def pooled(x: Tensor) -> Tensor:
    """(batch, channels) of a layer's outputs."""
    if x.ndim not in (2, 3, 4):
        raise ValueError(f"layer: expected outputs of 2 to 4 dimensions, got {tuple(x.shape)}")
    if x.ndim == 4:
        return x.mean((2, 3))
    return x[:, 0] if x.ndim == 3 else x


def soft_labels(
    logits: Tensor, weak: Tensor, labels: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """USKD's soft targets of logits (batch, classes): the labels' (batch,), and all others'
    (batch, classes), 0 at the label, that sum to 1."""
    log_p, w = logits.log_softmax(-1), weak.softmax(-1)
    squares = label_log_p(log_p, labels).exp().square()
    target = squares + 1 - batch_mean(squares, labels, training)
    own = labels.clamp(min=0)[:, None]
    weak_part = w / (1 - w.gather(-1, own) + 1e-6)
    score = weak_part + log_p / (1 - log_p.gather(-1, own) + 1e-6)
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1) + 1
    others = rank.to(logits.dtype).reciprocal().scatter(-1, own, 0.0)
    return target, others / others.sum(-1, keepdim=True)


def batch_mean(x: Tensor, labels: Tensor, training: bool) -> Tensor:
    """Mean of x (batch,) where there is a label, over all processes' batches."""
    known = labels != IGNORED
    sums = torch.stack([(x * known).sum(), known.sum().to(x.dtype)])
    group = processes(training)
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums[0] / sums[1].clamp(min=1)


def others_log_p(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-softmax of logits (..., classes) among those other than the label's; 0 at the label."""
    own = labels.clamp(min=0)[..., None]
    label = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, own, True)
    return logits.masked_fill(label, -torch.inf).log_softmax(-1).masked_fill(label, 0.0)
