"""EnCodec's balancer: losses count by their share of the gradient at the model's output."""

import contextlib
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.losses import precise
from techniques.gradient.parts import coefficients
from training.errors import UsageError
from training.objective import Backward, Batch, Losses


class LossGradientBalancer:
    """Backpropagates, from the model's output y, instead of Σ λᵢ·gᵢ with gᵢ = ∂ℓᵢ/∂y

        Σ R · (λᵢ / Σ λ) · gᵢ / (ε + ⟨‖gᵢ‖⟩)

    with ⟨·⟩ a bias-corrected running mean over steps, so that λᵢ is the fraction of the gradient
    that ℓᵢ has, whatever its scale. λᵢ is a penalty's coefficient, and 1 for the task's loss. A
    penalty that is no function of y (of the weights, of a latent) is added with its coefficient, as
    the paper adds its commitment loss. This is EnCodec's balancer alone, without its codec.

    With `per_batch_item` a sample's gradient has a norm of about R whatever the batch's size, so
    that the model's is summed over samples. All micro-batches are held until their norms are known.
    Parameters of the loss itself get no gradient.

    Args:
        total_norm: R; 1 as in the code.
        ema_decay: of the norms' running means; 0.999 as in the paper and in the code.
        per_batch_item: whether a norm is the mean of the samples' norms, else that of the batch.
        epsilon: ε; 1e-12 as in the code.
        monitor: whether `train/ratio_<part>` tells each part's share of the norms before balancing.

    Shapes: `logits` (batch, ...).

    Raises:
        ValueError: for a norm or an ε that is not positive, or a decay outside [0, 1].
        UsageError: at the first step, for a model without logits.

    Source: "High Fidelity Neural Audio Compression", arXiv 2210.13438, section 3.4;
    https://github.com/facebookresearch/encodec, `encodec/balancer.py`.
    """

    def __init__(
        self,
        total_norm: float = 1.0,
        ema_decay: float = 0.999,
        per_batch_item: bool = True,
        epsilon: float = 1e-12,
        monitor: bool = False,
    ) -> None:
        for name, value in {"total_norm": total_norm, "epsilon": epsilon}.items():
            if value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay: must be in [0, 1], got {ema_decay}")
        self.total_norm, self.ema_decay, self.epsilon = total_norm, ema_decay, epsilon
        self.per_batch_item, self.monitor = per_batch_item, monitor
        self.sums: dict[str, float] = {}
        self.count = 0.0

    def __call__(
        self,
        objective: nn.Module,
        model: nn.Module,
        microbatches: list[Batch],
        backward: Backward,
    ) -> Losses:
        found = forward(objective, microbatches)
        scale = getattr(backward, "scale", 1.0)
        shares = [batch["share"] for batch in microbatches]
        pieces = [at_output(losses, s, scale) for losses, s in zip(found, shares)]
        averages = self._average(norms(pieces, self.per_batch_item))
        lams = coefficients(objective)
        whole = sum(lams[name] for name in averages)
        factors = {
            name: self.total_norm * lams[name] / whole / (self.epsilon + average)
            for name, average in averages.items()
        }
        backward(surrogate(found, shares, pieces, factors, lams))
        return self._losses(found, shares, averages)

    def _average(self, norms: dict[str, float]) -> dict[str, float]:
        """The running means, with these norms in them."""
        if not all(map(math.isfinite, norms.values())):  # fp16's loss scale is too large: no step
            return norms
        self.sums = {n: self.sums.get(n, 0.0) * self.ema_decay + v for n, v in norms.items()}
        self.count = self.count * self.ema_decay + 1
        return {name: value / self.count for name, value in self.sums.items()}

    def _losses(
        self, found: list[Losses], shares: list[Tensor], averages: dict[str, float]
    ) -> Losses:
        names = found[0].parts
        parts = {
            n: torch.stack([x.parts[n].detach() * s for x, s in zip(found, shares)]).sum()
            for n in names
        }
        total = torch.stack([x.total.detach() * s for x, s in zip(found, shares)]).sum()
        if self.monitor:
            whole = sum(averages.values())
            ratios = {f"ratio_{name}": total.new_tensor(v / whole) for name, v in averages.items()}
            parts |= ratios
        return Losses(total, parts)

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.sums, self.count = dict(state["sums"]), state["count"]


def forward(objective: nn.Module, microbatches: list[Batch]) -> list[Losses]:
    """The losses of every micro-batch, for one backward of them all."""
    found = []
    no_sync = getattr(objective, "no_sync", contextlib.nullcontext)
    for i, batch in enumerate(microbatches):
        with contextlib.nullcontext() if i == len(microbatches) - 1 else no_sync():
            found.append(objective(batch))
    return found


def at_output(losses: Losses, share: Tensor, scale: float) -> dict[str, Tensor]:
    """By part, the gradient of its share of the loss at the logits, in float32 at least; those that
    are no function of them are left out."""
    try:
        y = losses.outputs["logits"]
    except KeyError:
        raise UsageError("gradient: the balancer needs a model that returns logits") from None
    found = {}
    for name, part in losses.parts.items():
        if part.requires_grad:
            loss = part * share * scale
            (g,) = torch.autograd.grad(loss, y, retain_graph=True, allow_unused=True)
            if g is not None:
                found[name] = precise(g) / scale
    return found


def norms(pieces: list[dict[str, Tensor]], per_batch_item: bool) -> dict[str, float]:
    """By part, the mean norm of the gradients of all processes' samples, or that of them all."""
    names = list(pieces[0])
    several = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if several else 1  # a share is that many times its own
    squares = [
        torch.cat([(p[name] / world).flatten(1).square().sum(1) for p in pieces]) for name in names
    ]
    values = [s.sqrt() if per_batch_item else s for s in squares]
    sums = torch.stack([*(v.sum() for v in values), values[0].new_tensor(float(len(values[0])))])
    if several:
        dist.all_reduce(sums)
    *found, count = sums.tolist()
    return {n: v / count if per_batch_item else v**0.5 for n, v in zip(names, found)}


def surrogate(
    found: list[Losses],
    shares: list[Tensor],
    pieces: list[dict[str, Tensor]],
    factors: dict[str, float],
    lams: dict[str, float],
) -> Tensor:
    """A scalar whose gradient is the balanced one at the outputs, and that of the other parts."""
    terms = []
    for losses, share, gradients in zip(found, shares, pieces):
        out = sum(factors[name] * g for name, g in gradients.items())
        terms.append((precise(losses.outputs["logits"]) * out).sum())
        for name, part in losses.parts.items():
            if name not in gradients:
                terms.append(lams[name] * part * share)
    return torch.stack(terms).sum()
