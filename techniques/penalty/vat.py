"""Virtual adversarial training."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tasks.losses import precise
from training.errors import UsageError


class VAT:
    """KL(p(·|x) ‖ p(·|x + r)), r the perturbation of norm ε that changes the prediction most.

    r is found by power iteration on the curvature of the divergence at x: from a random direction
    d, repeat d ← ∇_d KL(p(·|x) ‖ p(·|x + ξ·d/‖d‖)); then r = ε·d/‖d‖. No labels are used, p(·|x) is
    a constant, and the forwards are those of training (batch statistics, dropout) but move no
    running average.

    Args:
        epsilon: ε, L2 norm of the perturbation of a sample, in units of the model's input; the one
            setting to tune. 8, the default, is the authors' for augmented CIFAR-10 (10 without
            augmentation, 2.5 to 3.5 for SVHN).
        xi: ξ, step of the finite difference; 1e-6 as in the authors' code. In float32 that is near
            the rounding of x, and the direction found is mostly that of rounding errors carried
            back to the input; from about 1e-3 on it is the one of largest curvature.
        power_iterations: 1 in the paper, each costs a forward and a backward.
        entropy: add the entropy of p(·|x), the paper's VAT + EntMin.

    The overlay's coefficient is the authors', 1. Under autocast the power iteration runs in
    float32, with one more forward: a step of ξ is lost in half precision.

    Shapes: one floating-point input (batch, ...) and `logits` (batch, ..., classes) to a scalar,
    the mean over samples (and positions).

    Raises:
        ValueError: for a setting that is not positive.
        UsageError: for a model without exactly one continuous input (tokens cannot be perturbed),
            or for labels that are no classes.

    Source: "Virtual Adversarial Training: A Regularization Method for Supervised and
    Semi-Supervised Learning", arXiv 1704.03976; https://github.com/takerum/vat_tf, `vat.py`.
    """

    def __init__(
        self,
        epsilon: float = 8.0,
        xi: float = 1e-6,
        power_iterations: int = 1,
        entropy: bool = False,
    ) -> None:
        settings = {"epsilon": epsilon, "xi": xi, "power_iterations": power_iterations}
        for name, value in settings.items():
            if value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        self.epsilon, self.xi = epsilon, xi
        self.power_iterations, self.entropy = power_iterations, entropy

    def __call__(self, model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
        inputs, name = model_inputs(model, batch)
        x, clean = inputs[name].detach(), outputs["logits"]

        def logits(perturbation: Tensor | float) -> Tensor:
            # On copies of the buffers, so that running averages stay as they are.
            buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
            perturbed = {**inputs, name: x + perturbation}
            return functional_call(model, buffers, (), perturbed)["logits"]

        half = torch.is_autocast_enabled(x.device.type)
        direction = torch.randn_like(x)
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            exact = logits(0.0).detach() if half else clean.detach()
            for _ in range(self.power_iterations):
                step = (self.xi * unit(direction)).requires_grad_()
                (direction,) = torch.autograd.grad(divergence(exact, logits(step)), step)
        penalty = divergence(clean.detach(), logits(self.epsilon * unit(direction)))
        return penalty + mean_entropy(clean) if self.entropy else penalty


def model_inputs(model: nn.Module, batch: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the model takes of a batch, and the name of the one continuous tensor in it."""
    names = getattr(model, "inputs", None) or inspect.signature(model.forward).parameters
    inputs = {name: batch[name] for name in names if name in batch}
    continuous = [name for name, value in inputs.items() if value.is_floating_point()]
    if len(continuous) != 1:
        raise UsageError(
            "penalties.vat: needs one continuous input to perturb (images, features), "
            f"the model takes {', '.join(inputs)}"
        )
    labels = batch.get("labels")
    if labels is not None and labels.is_floating_point():
        raise UsageError("penalties.vat: needs a task with classes, the labels are real numbers")
    return inputs, continuous[0]


def unit(d: Tensor) -> Tensor:
    """Each sample at L2 norm 1, divided by its largest entry first lest its squares vanish."""
    features = tuple(range(1, d.ndim))
    d = d / (1e-12 + d.abs().amax(features, keepdim=True))
    return d / (1e-6 + d.square().sum(features, keepdim=True)).sqrt()


def divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(softmax(p) ‖ softmax(q)), the mean over all but the last dimension."""
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def mean_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits), the mean over all but the last dimension."""
    log_p = log_softmax(logits)
    return -(log_p.exp() * log_p).sum(-1).mean()


def log_softmax(logits: Tensor) -> Tensor:
    """Of the last dimension, in float32 at least."""
    return precise(logits).log_softmax(-1)
