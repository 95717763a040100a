"""EMO: earth mover distance for language models, with cosines of embeddings as its cost."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.losses import IGNORED, precise
from training.errors import UsageError
from training.objective import predict

AT_ONCE = {"cpu": 2**22}
"""Logits that exist at once; 2²⁷ on a GPU."""


class EMOLoss(nn.Module):
    """½·(CE + r·D), with D = 1 − (Eᵀq)·(Eᵀp) the cost of moving the model's q to the label's p.

    q is the softmax of the logits, p one-hot at the label, and the rows of E are the embeddings of
    the vocabulary at length 1: D = Σᵥ qᵥ·(1 − cos(eᵥ, e_label)), the earth mover distance to p,
    which has one point, so that every plan moves all of q there. r = CE / (D + 1e-10) is a constant
    in the backward, each token's own; it makes both halves weigh alike, and the value CE.

    E is a frozen copy of the classifier's weights at the start of training, which `freeze` makes
    (in the overlay's `reparam`), so that the model should have been trained before. It is a buffer
    of the loss, and checkpoints have it.

    The mathematics needs all of q at once, so that it is not `linear_cross_entropy`, but neither
    does the matrix of logits exist: 2²² of them on a CPU (2²⁷ on a GPU), with as many costs, are
    made at a time, and again in the backward (three matrix products with the vocabulary, forward
    and backward, become six). Beside those E takes the memory of the classifier.

    Its value is in [0, ∞) and 0 only where q is 1 at the label, the minimiser for one label. The
    expectation has its stationary point elsewhere than at q = p: CE has its there, but D is linear
    in q, and its expectation is smallest where all of q is at the token nearest to all that are
    likely, so that q is pulled there. The gradient of D is qᵥ·(costᵥ − D), at most D, and 0 where
    the softmax is saturated, right or wrong; CE has its own there, so that a wrong token of
    probability 1 is unlearnt at half CE's pace. Of a wrong softmax the value grows linearly with
    the logits.

    Shapes: `hidden` (..., dim) and integer `labels` (...) to losses (...), 0 where a label is −100.

    Raises:
        UsageError: for a model that does not return `hidden` and a `classifier` with weights, or
            when `freeze` is not in `reparam`.

    Source: "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling", arXiv
    2310.04691; https://github.com/DRSY/EMO, `language_modeling/gpt2.py` (`mode == "emo"`) and
    `run_lm.py`. The code for LLaMA has other compositions: `emo_patch.py` leaves the label's own
    term out of D's value, and in its second loss CE is scaled to D; `continual_finetuning/
    emo_llama.py` bounds r by 3.
    """

    embedding: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("embedding", None)

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        classifier = classifier_of(outputs)
        if self.embedding is None:
            raise UsageError("task.loss: emo_loss needs techniques.loss.emo_loss.freeze in reparam")
        labels = batch["labels"]
        counted = labels != IGNORED
        hidden, targets = outputs["hidden"][counted], labels[counted]
        at_once = AT_ONCE.get(labels.device.type, 2**27)
        size = max(at_once // len(self.embedding), 1)
        parts = [
            checkpoint(
                emo,
                classifier,
                *rows,
                self.embedding,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for rows in zip(hidden.split(size), targets.split(size))
        ]
        losses = torch.cat(parts)  # pyright: ignore[reportArgumentType]
        return losses.new_zeros(labels.shape).masked_scatter(counted, losses)


def emo(classifier: nn.Module, hidden: Tensor, targets: Tensor, embedding: Tensor) -> Tensor:
    """The losses of some tokens, (tokens, dim) and (tokens,) to (tokens,)."""
    logits = classifier(hidden)
    log_q = precise(logits).log_softmax(-1)
    cross_entropy = -log_q.gather(1, targets[:, None]).squeeze(1)
    moved = distance(log_q, targets, embedding)
    return (cross_entropy + (cross_entropy / (moved + 1e-10)).detach() * moved) / 2


def distance(log_q: Tensor, targets: Tensor, embedding: Tensor) -> Tensor:
    """D of log-probabilities (tokens, vocabulary), as a sum of costs none of which is negative."""
    with torch.autocast(log_q.device.type, enabled=False):
        cost = (1 - embedding[targets] @ embedding.T).clamp(min=0)
    return (log_q.exp() * cost.scatter(1, targets[:, None], 0)).sum(-1)


def freeze(model: nn.Module, batches: Iterator[dict[str, Any]], loss: EMOLoss) -> None:
    """Give the loss its copy of the classifier's weights. A reparametrisation that leaves the model
    as it is; it runs it once on a batch to find the classifier."""
    training = model.training
    model.eval()
    with torch.no_grad():
        classifier = classifier_of(predict(model, next(batches)))
        weight = classifier.weight.detach()
        weight = precise(weight)
        loss.embedding = nn.functional.normalize(weight, dim=1)
    model.train(training)


def classifier_of(outputs: Any) -> Any:
    """The module in `outputs` that makes logits of hidden states, with a row for each token."""
    if "hidden" not in outputs or "classifier" not in outputs:
        raise UsageError(
            "task.loss: emo_loss needs a model that returns `hidden` and `classifier`; this one "
            f"returns {', '.join(outputs)}"
        )
    classifier = outputs["classifier"]
    weight = getattr(classifier, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UsageError(
            "task.loss: emo_loss needs a classifier with a matrix of weights, got "
            f"{type(classifier).__name__}"
        )
    return classifier
