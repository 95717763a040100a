"""Cut cross-entropy: the loss of a large vocabulary without its logits."""

from typing import Any

from torch import Tensor, nn

from kernels.backend import BACKENDS
from kernels.linear_cross_entropy import linear_cross_entropy
from tasks.losses import IGNORED, cross_entropy
from training.errors import UsageError


class CutCrossEntropy:
    """Cross-entropy of a linear classifier, computed from the hidden states block by block.

    The value and the gradients are those of cross-entropy on the logits; the matrix of logits,
    (tokens, vocabulary), never exists, forward or backward. The classifier is the linear layer in
    `outputs["classifier"]`.

    Minimiser: the labels' distribution, as softmax. Range: [0, ∞). At saturated logits it grows
    like the margin on the wrong side and vanishes, with its gradient, on the right one.

    Args:
        softcap: bound of the logits, softcap·tanh(logits / softcap), for models that have one.
        label_smoothing: in [0, 1].
        filter_eps: the Triton backward skips tiles of logits whose gradients are all below this;
            `"auto"`, the authors' default, is the dtype's epsilon / 32 (2⁻¹² in bfloat16, the
            paper's). None is exact; the paper uses that (CCE-Kahan-FullC) to pre-train.
        kahan: sum half-precision gradients with Kahan's compensation instead of in float32.
        backend: `"auto"`, `"reference"`, `"tiled"` or `"triton"`.

    Shapes: `hidden` (..., dim) and integer `labels` (...) to losses (...), 0 where a label is −100.

    Raises:
        ValueError: for an option out of its range.
        UsageError: for a model that does not return `hidden` and a linear `classifier`.

    Source: "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009;
    https://github.com/apple/ml-cross-entropy, `cut_cross_entropy/`.
    """

    needs_hidden = True

    def __init__(
        self,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        filter_eps: float | str | None = "auto",
        kahan: bool = False,
        backend: str = "auto",
    ) -> None:
        if softcap is not None and softcap <= 0:
            raise ValueError(f"softcap: must be positive, got {softcap}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: must be in [0, 1], got {label_smoothing}")
        if filter_eps not in (None, "auto") and (isinstance(filter_eps, str) or filter_eps <= 0):
            raise ValueError(f"filter_eps: null, 'auto' or a positive number, got {filter_eps!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend: one of {', '.join(BACKENDS)}, got {backend!r}")
        self.options = {
            "softcap": softcap,
            "label_smoothing": label_smoothing,
            "filter_eps": filter_eps,
            "kahan": kahan,
            "backend": backend,
        }

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        if "hidden" not in outputs or "classifier" not in outputs:
            raise UsageError(
                "task.loss: cut_cross_entropy needs a model that returns `hidden` and "
                f"`classifier`; this one returns {', '.join(outputs)}"
            )
        classifier = outputs["classifier"]
        if getattr(type(classifier), "forward", None) is not nn.Linear.forward:
            raise UsageError(
                f"task.loss: cut_cross_entropy needs a linear head, got {type(classifier).__name__}"
            )
        losses = linear_cross_entropy(
            outputs["hidden"],
            classifier.weight,
            batch["labels"],
            bias=classifier.bias,
            ignore_index=IGNORED,
            reduction="none",
            **self.options,
        )
        assert isinstance(losses, Tensor)  # a pair only with return_lse
        return losses


EXACT = CutCrossEntropy(filter_eps=None)


def fused_cross_entropy(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """The task's cross-entropy, for losses that are a function of it: of a language model with a
    linear `classifier` without its logits, whose gradients are then of first order only."""
    linear = getattr(type(outputs.get("classifier")), "forward", None) is nn.Linear.forward
    if linear and "logits" not in outputs and batch["labels"].ndim > 1:
        return EXACT(outputs, batch)
    return cross_entropy(outputs, batch)
