"""SAF: sharpness-aware training without a second pass."""

from typing import Any

from torch import Tensor, nn

from tasks.losses import precise
from techniques.distill.memory import Recent, note, recalled


class SAF:
    """τ²·KL(softmax(z⁻/τ) ‖ softmax(z/τ)), z the logits and z⁻ those of the same sample n epochs
    before, a constant: the trajectory loss, which resists sudden falls of the loss.

    The mean over the batch; samples count for 0 in the epochs up to `start`, the first being 0, and
    where the model has not seen them n epochs before.

    Its minimiser is softmax(z/τ) = softmax(z⁻/τ), where it is 0; its values are not negative and
    without bound. At saturated logits it grows linearly in them and its gradient, τ times the
    difference of the softened predictions over the batch size, stays bounded.

    The overlay's coefficient is 0.3. n, τ, `start` and the coefficient are those of the code's
    README and of its `run.sh` for SAF (the script's own defaults are n = 3 and 0.16). τ² is in the
    code. The logits are kept for each sample by `techniques.distill.memory`, which the overlay
    adds. MESA (`MESA_train.py`), with the logits of averaged weights in their place, is not here.

    Args:
        epochs: n; 2, or 3.
        temperature: τ; 5.
        start: the last epoch without it; 5.

    Shapes: `logits` (batch, classes) to a scalar.

    Raises:
        ValueError: for an n below 1, a τ that is not positive or a negative start; at the first
            step, without the callback or on a task that is no classification.

    Source: "Sharpness-Aware Training for Free", arXiv 2205.14083;
    https://github.com/AngusDujw/SAF, `SAF_train.py`, `run.sh`, `README.md`.
    """

    def __init__(self, epochs: int = 2, temperature: float = 5.0, start: int = 5) -> None:
        if epochs < 1:
            raise ValueError(f"epochs: must be at least 1, got {epochs}")
        if temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        if start < 0:
            raise ValueError(f"start: must not be negative, got {start}")
        self.epochs, self.temperature, self.start = epochs, temperature, start
        self.recent: Recent = {}

    def __call__(self, model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
        z, (past, known) = outputs["logits"], recalled(batch, self.epochs)
        note(self.recent, outputs, batch)
        z = precise(z)
        if past.shape != z.shape:  # nothing is remembered yet
            past = z.detach()
        log_q = (z / self.temperature).log_softmax(-1)
        log_p = (past.to(z.dtype) / self.temperature).log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        counted = known & (batch["epoch"] > self.start)
        return self.temperature**2 * (divergence * counted).mean()
