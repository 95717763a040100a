"""Bloop: the auxiliary gradient without its part along the main one's running mean."""

from typing import Any

import torch
from torch import nn

from techniques.gradient.parts import Gradient, combine, part_gradients, placed, products, put
from training.objective import Backward, Batch, Losses


class Bloop:
    """A bilevel goal, the penalties at their least among the minimisers of the loss:

        m ← (1 − ρ)·m + ρ·g_main,   d = g_main + λ·(g_aux − (⟨g_aux, m⟩ / (‖m‖² + 1e-7))·m)

    g_main is the loss's gradient, g_aux that of the penalties with their coefficients; λ multiplies
    these. m begins as the first g_main. With ρ = 1 it is the projection without a running mean.

    Args:
        lam: λ; 0.1 as in the code.
        ema: ρ, the weight of the newest gradient; 0.1 as in the code, whose examples set 0.01.

    Raises:
        ValueError: for a negative λ or a ρ outside (0, 1]; at the first step, for a run without
            penalties.

    Source: "Careful with that Scalpel: Improving Gradient Surgery with an EMA", arXiv 2402.02998;
    https://github.com/apple/ml-bloop, `src/bloop/optim.py` (`bloop_direction`) and `utils.py`. Its
    examples begin m at the parameters, which `init_bloop` takes for a gradient; here it begins at a
    gradient.
    """

    def __init__(self, lam: float = 0.1, ema: float = 0.1) -> None:
        if lam < 0:
            raise ValueError(f"lam: must not be negative, got {lam}")
        if not 0 < ema <= 1:
            raise ValueError(f"ema: must be in (0, 1], got {ema}")
        self.lam, self.ema = lam, ema
        self.mean: Gradient = []

    def __call__(
        self,
        objective: nn.Module,
        model: nn.Module,
        microbatches: list[Batch],
        backward: Backward,
    ) -> Losses:
        losses, gradients = part_gradients(objective, model, microbatches, backward)
        main = gradients.pop("loss")
        auxiliary = combine([1.0] * len(gradients), list(gradients.values()))
        before = placed(self.mean, objective) or main
        mean = combine([1 - self.ema, self.ema], [before, main])
        with torch.no_grad():
            dots = products([mean, auxiliary])
            share = (dots[0, 1] / (dots[0, 0] + 1e-7)).item()
            direction = combine([1.0, self.lam, -self.lam * share], [main, auxiliary, mean])
        if dots.isfinite().all():  # else fp16's loss scale is too large, and there is no step
            self.mean = mean
        put(direction, objective, backward)
        return losses

    def state_dict(self) -> dict[str, Any]:
        """The running mean."""
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.mean = state["mean"]
