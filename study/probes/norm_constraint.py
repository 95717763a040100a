"""Whether weights are within the constraint that Lion-K's weight decay stands for."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from techniques.callback import probing

if TYPE_CHECKING:
    from training.run import Run


class NormConstraint:
    """Measures matrices against ‖w‖_q ≤ 1/λ, with 1/p + 1/q = 1, each by itself. At each evaluation
    it records:

        probe/size      the largest λ·‖w‖_q: 1 at most when all are within
        probe/overshoot the largest excess of λ·‖w‖_q − 1, over the steps so far, above its bound:
                        its first value times Π (1 − lr·λ), or 0 where the matrix starts within
        probe/gap       Σ ‖g‖ₚ/λ + ⟨g, w⟩, with g the gradient of the training loss: the Frank–Wolfe
                        gap, 0 where the loss is least within the constraint; for a convex loss of
                        the matrices alone it bounds how far above that it is

    The gap is that of the task's mean loss over evenly spaced training samples, the model in
    evaluation mode, in the loss's unit.

    Args:
        decay: λ, positive; not the optimizer's, so that one without decay can be measured too.
        p: of K's norm, at least 1; 1 is Lion's.
        samples: of the training set, all in one batch.

    Raises:
        ValueError: for a λ that is not positive or a p below 1.

    Not for FSDP2, which has no whole weights between steps.

    Source: "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts", arXiv 2310.05898.
    """

    def __init__(self, decay: float, p: float = 1.0, samples: int = 2048) -> None:
        if decay <= 0:
            raise ValueError(f"decay: must be positive, got {decay}")
        if p < 1:
            raise ValueError(f"p: must be at least 1, got {p}")
        self.decay, self.p, self.samples = decay, p, samples
        self.q = float("inf") if p == 1 else p / (p - 1)
        self.bounds: list[float] = []
        self.overshoot = -float("inf")

    def on_fit_start(self, run: "Run") -> None:
        """Note how far outside the weights start."""
        if not self.bounds:
            self.bounds = [max(size - 1, 0.0) for size in self._sizes(run)]

    def on_gradients(self, run: "Run") -> None:
        """Shrink the bounds by the step that is about to be taken."""
        shrink = 1 - run.optimizer.param_groups[0]["lr"] * self.decay
        self.bounds = [bound * shrink for bound in self.bounds]

    def on_step_end(self, run: "Run") -> None:
        """Compare."""
        found = [size - 1 - bound for size, bound in zip(self._sizes(run), self.bounds)]
        self.overshoot = max(self.overshoot, *found)

    def on_eval_end(self, run: "Run") -> None:
        """Measure."""
        values = {"probe/size": max(self._sizes(run)), "probe/gap": self._gap(run)}
        run.record(values | {"probe/overshoot": self.overshoot})

    def state_dict(self) -> dict[str, Any]:
        """The bounds so far."""
        return {"bounds": self.bounds, "overshoot": self.overshoot}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.bounds, self.overshoot = state["bounds"], state["overshoot"]

    def _sizes(self, run: "Run") -> list[float]:
        return [self.decay * _norm(w.detach(), self.q) for w in _matrices(run)]

    def _gap(self, run: "Run") -> float:
        batch, training = probing.training_batch(run, self.samples), run.model.training
        matrices = _matrices(run)
        run.objective.eval()
        try:
            with torch.enable_grad():
                loss = run.task.loss(run.objective.predict(batch), batch).mean()
                gradients = torch.autograd.grad(loss, matrices)
        finally:
            run.objective.train(training)
        pairs = zip(gradients, matrices)
        return sum(_norm(g, self.p) / self.decay + float((g * w.detach()).sum()) for g, w in pairs)


def _matrices(run: "Run") -> list[Tensor]:
    """What is decayed."""
    return [p for p in run.model.parameters() if p.requires_grad and p.ndim >= 2]


def _norm(x: Tensor, order: float) -> float:
    return float(torch.linalg.vector_norm(x, order))
