"""Mixed precision: half-precision weights and gradients, a master copy, and a scaled loss."""

from typing import Any

from torch import Tensor, nn

from training.objective import Backward, Batch, Losses, backprop
from training.parallel import local, whole


class MixedPrecision:
    """The gradient of S·loss at weights rounded to float16, itself rounded to float16, over S.

    The weights that the optimizer changes are the master copy in float32, rounded for each step.
    When a gradient is not finite, the step is skipped (there are no gradients). S is fixed, or
    falls by `backoff_factor` then, and grows by `growth_factor` after `growth_interval` steps
    without. Products sum in float32. This emulates, anywhere, what `trainer.precision=fp16` does on
    a GPU; `techniques.reparam.mixed_precision_loss_scaling` rounds activations and their gradients.

    Args:
        scale: S for good, such as 1 for none; `None`: dynamic. The paper uses 8 to 32,768.
        master: else the weights themselves are float16, and what the optimizer adds to them is
            rounded away where it is less than half of their last place.
        init_scale, growth_factor, backoff_factor, growth_interval: of the dynamic S; as in
            `torch.amp.GradScaler`.

    Raises:
        ValueError: for a scale or factor out of its range; at the first step, when the trainer
            scales losses itself.

    Source: "Mixed Precision Training", arXiv 1710.03740, section 3; `torch.amp.GradScaler` for the
    dynamic scale, which the paper describes without numbers.
    """

    def __init__(
        self,
        scale: float | None = None,
        master: bool = True,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        for name, value in {"scale": scale, "init_scale": init_scale}.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        if growth_factor <= 1:
            raise ValueError(f"growth_factor: must be greater than 1, got {growth_factor}")
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor: must be in (0, 1), got {backoff_factor}")
        if growth_interval < 1:
            raise ValueError(f"growth_interval: must be at least 1, got {growth_interval}")
        self.master, self.dynamic = master, scale is None
        self.scale = init_scale if scale is None else scale
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval, self.streak = growth_interval, 0

    def __call__(
        self,
        objective: nn.Module,
        model: nn.Module,
        microbatches: list[Batch],
        backward: Backward,
    ) -> Losses:
        if getattr(backward, "scale", 1.0) != 1.0:
            raise ValueError("gradient: trainer.precision=fp16 scales the loss itself; use fp32")
        parameters = [p for p in objective.parameters() if p.requires_grad]
        masters = [local(p.detach()).clone() for p in parameters]
        _round([p.detach() for p in parameters])
        losses = backprop(objective, model, microbatches, lambda loss: backward(loss * self.scale))
        if self.master:
            for parameter, value in zip(parameters, masters):
                local(parameter.detach()).copy_(value)
        grads = [p.grad for p in parameters if p.grad is not None]
        _round(grads)
        finite = bool(whole(nn.utils.get_total_norm(grads)).isfinite())
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.div_(self.scale) if finite else None
        self._update(finite)
        return losses

    def _update(self, finite: bool) -> None:
        if not self.dynamic:
            return
        self.streak = self.streak + 1 if finite else 0
        if not finite:
            self.scale *= self.backoff_factor
        elif self.streak == self.growth_interval:
            self.scale, self.streak = self.scale * self.growth_factor, 0

    def state_dict(self) -> dict[str, Any]:
        """S, and the finite steps since it changed."""
        return {"scale": self.scale, "streak": self.streak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.scale, self.streak = state["scale"], state["streak"]


def _round(tensors: list[Tensor]) -> None:
    """To float16, in place; what is too large becomes infinite."""
    for tensor in tensors:
        part = local(tensor)
        part.copy_(part.half())
