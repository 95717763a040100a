"""A push to the weights at one step, to see whether training comes back."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.parallel import like, local, whole

if TYPE_CHECKING:
    from training.run import Run


class ButterflyPerturbation:
    """Adds noise to the weights once, before the step after `step` finished ones:

        θ ← θ + σ·m ⊙ ε·√(Σᵢ nᵢ·sᵢ²) / ‖ε‖₂,   εᵢ ~ 𝒩(0, sᵢ²),

    where sᵢ is the standard deviation of weight i, which has nᵢ elements, before the first step, so
    that σ = 1 is the scale of what training starts from; and m is 1 for a random `fraction` of all
    elements, else 0. Weights are the trained parameters of more than one dimension, not biases and
    those of norms. The authors know sᵢ from the initialisation's formula; here it is that of the
    weights. Everything else, random numbers too, is as in a run without it, so that two runs of one
    seed are twins until then. Its norm is recorded as `perturbation`.

    It costs three copies of the weights in float64 on the CPU at its step, and nothing at others.

    Args:
        step: finished steps; 0 is before the first.
        scale: σ.
        fraction: of the elements that are moved.
        seed: of the noise.

    Raises:
        ValueError: for a value out of its range; at the start, for a fraction of less than half an
            element.

    Source: "The Butterfly Effect: Neural Network Training Trajectories Are Highly Sensitive to
    Initial Conditions", arXiv 2506.13234, equation 6 for Gaussian noise;
    https://github.com/gsaltintas/lmc, `lmc/butterfly/butterfly.py` with `normalize_perturb`, and
    `lmc/experiment/perturb.py`.
    """

    def __init__(self, step: int, scale: float, fraction: float = 1.0, seed: int = 0) -> None:
        if step < 0:
            raise ValueError(f"step: must be at least 0, got {step}")
        if scale < 0:
            raise ValueError(f"scale: must be at least 0, got {scale}")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: must be in (0, 1], got {fraction}")
        self.step, self.scale, self.fraction, self.seed = step, scale, fraction, seed
        self.deviations: dict[str, float] = {}

    def on_fit_start(self, run: "Run") -> None:
        """Look at the scale of the weights."""
        weights = _weights(run)
        if round(self.fraction * sum(w.numel() for w in weights.values())) == 0:
            raise ValueError(f"fraction: {self.fraction} of the weights is none of them")
        if not self.deviations:
            self.deviations = {n: float(whole(w).double().std()) for n, w in weights.items()}

    @torch.no_grad()
    def on_batch(self, run: "Run") -> None:
        """Push when it is time."""
        if run.step != self.step:
            return
        weights = _weights(run)
        added = noise(
            {name: (w.shape, self.deviations[name]) for name, w in weights.items()},
            *(self.scale, self.fraction, self.seed),
        )
        for name, weight in weights.items():
            local(weight).add_(local(like(added[name].to(weight.dtype), weight)))
        squares = sum(float(e.square().sum()) for e in added.values())
        run.record({"perturbation": math.sqrt(squares)})

    def state_dict(self) -> dict[str, Any]:
        """The weights' standard deviations before the first step."""
        return {"deviations": self.deviations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.deviations = dict(state["deviations"])


def noise(
    weights: dict[str, tuple[torch.Size, float]], scale: float, fraction: float, seed: int
) -> dict[str, Tensor]:
    """What is added to each weight of a shape and a standard deviation, float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: deviation * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, (shape, deviation) in weights.items()
    }
    expected = math.sqrt(sum(shape.numel() * s**2 for shape, s in weights.values()))
    actual = math.sqrt(sum(float(e.square().sum()) for e in drawn.values()))
    count = sum(e.numel() for e in drawn.values())
    mask = torch.zeros(count, dtype=torch.float64)
    mask[torch.randperm(count, generator=generator)[: round(fraction * count)]] = 1
    masks = mask.split([e.numel() for e in drawn.values()])
    factor = scale * expected / actual
    return {n: factor * e * m.view(e.shape) for (n, e), m in zip(drawn.items(), masks)}


def _weights(run: "Run") -> dict[str, Tensor]:
    named = run.model.named_parameters()
    return {name: p.detach() for name, p in named if p.requires_grad and p.ndim > 1}
