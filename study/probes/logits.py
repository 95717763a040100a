"""How large attention logits are, and how far output logits are from log probabilities."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.attention import SelfAttention, causal_bias
from techniques.callback import probing

if TYPE_CHECKING:
    from training.run import Run


class Logits:
    """Records on the last micro-batch, as `probe/attention_logit`, the largest q·k/√d of all
    layers, heads and pairs of tokens of which one sees the other, in size; and as `probe/log_z` the
    mean log Z of the output logits, Z = Σᵢ exp(logitᵢ), 0 where they are log probabilities.

    Args:
        every: steps between records, each of which costs one more forward pass.

    Raises:
        ValueError: for `every` below 1; at the start, for a model without `SelfAttention` layers.

    Source: what "Small-scale proxies for large-scale Transformer training instabilities", arXiv
    2309.14322, follows to see the two instabilities.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        self.every = every

    def on_fit_start(self, run: "Run") -> None:
        """Look for the layers."""
        if not any(isinstance(m, SelfAttention) for m in run.model.modules()):
            raise ValueError("callbacks.logits: the model has no SelfAttention")

    def on_step_end(self, run: "Run") -> None:
        """Record every `every` steps."""
        if run.step % self.every:
            return
        layers = [m for m in run.model.modules() if isinstance(m, SelfAttention)]
        found: list[float] = []
        for layer in layers:
            layer.attend = _watched(layer, found)
        try:
            with probing.looking(run):
                logits = run.objective.predict(run.batch)["logits"]
        finally:
            for layer in layers:
                del layer.attend  # the class's own again
        log_z = float(logits.float().logsumexp(-1).mean())
        values = {"probe/attention_logit": max(found), "probe/log_z": log_z}
        run.record({name: value for name, value in values.items() if math.isfinite(value)})


def _watched(layer: SelfAttention, found: list[float]) -> Any:
    attend = layer.attend

    def watch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q.float() @ keys.float().mT).abs() / math.sqrt(q.shape[-1])
        hidden = bias if bias is not None else torch.zeros((), device=q.device)
        if layer.causal:
            hidden = hidden + causal_bias(q)
        found.append(float(scores.masked_fill(hidden == -torch.inf, 0).max()))
        return attend(q, k, v, bias)

    return watch
