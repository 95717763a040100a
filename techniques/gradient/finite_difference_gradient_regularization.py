"""Gradient regularisation by a finite difference."""

import torch
from torch import nn

from techniques.gradient.sam import frozen_statistics
from training.objective import Backward, Batch, Losses, backprop


class FiniteDifferenceGradientRegularization:
    """The gradient of L + (γ/2)·‖∇L‖², its second term by a finite difference along ∇L:

        forward:   ∇L(w) + γ/ε · (∇L(w + ε·∇L(w)) − ∇L(w))
        backward:  ∇L(w) + γ/ε · (∇L(w) − ∇L(w − ε·∇L(w)))

    Two passes a step and no second derivative. Forward with γ = ε is the gradient at the ascended
    point, SAM without its normalisation. Running statistics of batch norms follow the first pass.
    The losses returned are those at w.

    Args:
        gamma: γ, strength of the regularisation.
        epsilon: ε, length of the step along the gradient.
        ascent: whether the difference is the forward one, which the paper prefers.

    Raises:
        ValueError: for a negative γ, or an ε that is not positive.

    Source: "Understanding Gradient Regularization in Deep Learning", arXiv 2210.02720 (equations
    for F-GR and B-GR). The paper tunes γ and ε together; the defaults here are ours.
    """

    def __init__(self, gamma: float = 0.05, epsilon: float = 0.05, ascent: bool = True) -> None:
        if gamma < 0:
            raise ValueError(f"gamma: must not be negative, got {gamma}")
        if epsilon <= 0:
            raise ValueError(f"epsilon: must be positive, got {epsilon}")
        self.gamma, self.epsilon, self.ascent = gamma, epsilon, ascent

    def __call__(
        self,
        objective: nn.Module,
        model: nn.Module,
        microbatches: list[Batch],
        backward: Backward,
    ) -> Losses:
        losses = backprop(objective, model, microbatches, backward)
        parameters = [p for p in objective.parameters() if p.grad is not None]
        weights = [p.detach().clone() for p in parameters]
        first = [p.grad.clone() for p in parameters if p.grad is not None]
        sign = 1.0 if self.ascent else -1.0
        with torch.no_grad():
            for parameter, gradient in zip(parameters, first):
                step = sign * self.epsilon / getattr(backward, "scale", 1.0)
                parameter.add_(gradient, alpha=step)
        objective.zero_grad(set_to_none=True)
        with frozen_statistics(model):
            backprop(objective, model, microbatches, backward)
        with torch.no_grad():
            for parameter, weight, gradient in zip(parameters, weights, first):
                parameter.copy_(weight)
                moved = gradient if parameter.grad is None else parameter.grad
                difference = (moved - gradient) * (sign * self.gamma / self.epsilon)
                parameter.grad = gradient + difference
        return losses
