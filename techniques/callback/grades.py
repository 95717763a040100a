"""Gradient-based early stopping of single matrices."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from training.run import Run


class GradES:
    """Freezes each matrix of the blocks for good once its gradient's L1 norm, after clipping, falls
    below τ, from the step α·max_steps on; training stops when all are frozen.

    Watched are the weights of the linear layers within `nn.ModuleList`s (the attention and
    feed-forward matrices of a transformer); other parameters train on. A frozen matrix has no
    gradient, so that its optimizer leaves it alone, weight decay included. Records the frozen
    share as `probe/frozen`.

    The paper's criterion is the gradient's norm. The authors' released code tests the L1 norm of
    the weight's change instead, against a default of 1e-4; τ depends on the model's size either
    way and is to be chosen.

    Args:
        tau: τ; 1e-4 as in the code.
        alpha: α, the fraction of the steps before any freezing; 0.3 as in the code.
        every: steps between tests.

    Raises:
        ValueError: for a τ that is not positive or an α outside [0, 1); at the start, for a model
            without such matrices.

    Source: "GradES: Significantly Faster Training in Transformers with Gradient-Based Early
    Stopping", arXiv 2509.01842; https://github.com/IXZZZ9/GradES,
    `grades/gradient_early_stopping.py`.
    """

    def __init__(self, tau: float = 1e-4, alpha: float = 0.3, every: int = 1) -> None:
        if tau <= 0:
            raise ValueError(f"tau: must be positive, got {tau}")
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha: must be in [0, 1), got {alpha}")
        if every < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        self.tau, self.alpha, self.every = tau, alpha, every
        self.frozen: set[str] = set()

    def on_fit_start(self, run: "Run") -> None:
        """Look for the matrices."""
        if not matrices(run.model):
            raise ValueError("callbacks.grades: the model has no blocks with linear layers")

    @torch.no_grad()
    def on_gradients(self, run: "Run") -> None:
        """Freeze what has converged, and take the gradients of what is frozen."""
        watched = matrices(run.model)
        if run.step >= self.alpha * run.max_steps and run.step % self.every == 0:
            for name, weight in watched.items():
                if weight.grad is not None and weight.grad.abs().sum() < self.tau:
                    self.frozen.add(name)
        for name in self.frozen:
            watched[name].grad = None

    def on_step_end(self, run: "Run") -> None:
        """Stop when nothing is left, and record the share at the trainer's log steps."""
        share = len(self.frozen) / len(matrices(run.model))
        if share == 1:
            run.stop("every matrix is frozen")
        if run.step % run.config["trainer"]["log_every"] == 0:
            run.record({"probe/frozen": share})

    def state_dict(self) -> dict[str, Any]:
        """Names of the frozen matrices."""
        return {"frozen": sorted(self.frozen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.frozen = set(state["frozen"])


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the linear layers in the model's lists of blocks, by name."""
    inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(inside)
        and parameter.ndim == 2
        and name.endswith(("weight", "weight.original"))
    }
