"""z-loss: logits of which the partition function stays near one."""

from typing import Any

from torch import Tensor, nn

from tasks.losses import IGNORED


def z_loss(model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
    """The mean of log² Z over the labels that count, Z = Σᵢ exp(logitᵢ).

    Cross entropy does not change when the same number is added to all logits, and they may drift
    from the log probabilities; this holds them there. The coefficient is 1e-4 in the papers.

    Source: "PaLM: Scaling Language Modeling with Pathways", arXiv 2204.02311, §5, as in
    "Small-scale proxies for large-scale Transformer training instabilities", arXiv 2309.14322.
    """
    squares = outputs["logits"].float().logsumexp(-1).square()
    counted = batch["labels"] != IGNORED
    return (squares * counted).sum() / counted.sum().clamp(min=1)
