"""Spectral alignment, an early warning of exploding losses."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from techniques.callback import probing

if TYPE_CHECKING:
    from training.run import Run


class SpectralAlignment:
    """Records how evenly the inputs of each linear layer fall on both sides of its weight's first
    singular vector.

    With v₁ the right singular vector of the largest singular value, a token's alignment is
    cos(x, v₁). Healthy training has both signs; when nearly all tokens have one, the paper finds,
    the loss is about to explode. Recorded are `probe/sign_diversity/<layer>`, the share of the
    rarer sign (0 to ½), and `probe/sign_diversity`, the smallest of them.

    Args:
        every: steps between records, each of which costs one more forward pass.
        iterations: of the power method for v₁, from where the last ones ended.

    Raises:
        ValueError: for a number below 1; at the start, for a model without linear layers.

    Source: "Spectral Alignment as Predictor of Loss Explosion in Neural Network Training", arXiv
    2510.04202. No released code was found.
    """

    def __init__(self, every: int = 50, iterations: int = 10) -> None:
        for name, value in {"every": every, "iterations": iterations}.items():
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        self.every, self.iterations = every, iterations
        self.vectors: dict[str, Tensor] = {}

    def on_fit_start(self, run: "Run") -> None:
        """Look for the layers."""
        if not _layers(run.model):
            raise ValueError("callbacks.spectral_alignment: the model has no linear layer")

    @torch.no_grad()
    def on_step_end(self, run: "Run") -> None:
        """Record after every `every` steps."""
        if run.step % self.every:
            return
        found: dict[str, float] = {}
        handles = [
            layer.register_forward_pre_hook(self._watch(name, layer, found))
            for name, layer in _layers(run.model).items()
        ]
        try:
            probing.forward(run)
        finally:
            for handle in handles:
                handle.remove()
        run.record(found | {"probe/sign_diversity": min(found.values())})

    def _watch(self, name: str, layer: nn.Linear, found: dict[str, float]) -> Any:
        def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            weight = layer.weight.detach().float()
            start = self.vectors.get(name)
            vector = first_singular_vector(weight, start, self.iterations)
            self.vectors[name] = vector
            found[f"probe/sign_diversity/{name}"] = sign_diversity(inputs[0], vector)

        return watch

    def state_dict(self) -> dict[str, Any]:
        """The vectors, by layer."""
        return {"vectors": {name: vector.cpu() for name, vector in self.vectors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.vectors = dict(state["vectors"])


def first_singular_vector(weight: Tensor, start: Tensor | None, iterations: int) -> Tensor:
    """The right singular vector (in,) of the largest singular value of `weight` (out, in), by the
    power method from `start`, or from the weight's largest row."""
    if start is None:
        start = weight[weight.norm(dim=1).argmax()]
    vector = F.normalize(start.to(weight), dim=0)
    for _ in range(iterations):
        vector = F.normalize(weight.T @ (weight @ vector), dim=0)
    return vector


def sign_diversity(x: Tensor, vector: Tensor) -> float:
    """Share of the rarer sign of x·vector over the rows of `x` (..., in)."""
    positive = (x.float() @ vector > 0).double().mean().item()
    return min(positive, 1 - positive)


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
