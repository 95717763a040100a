"""ConFIG: a direction in which all of a run's losses fall at the same rate."""

from typing import Any

import torch
from torch import Tensor, nn

from techniques.gradient.parts import (
    Gradient,
    coefficients,
    combine,
    names,
    part_gradients,
    placed,
    products,
    put,
    take,
    trained,
)
from training.objective import Backward, Batch, Losses, backprop


class ConFIG:
    """The gradient g with the same positive cosine to the gradient gᵢ of every part of the loss:

        g = (Σᵢ gᵢᵀu)·u,   u = U(U(g₁), ..., U(gₘ))⁻ᵀ1 / ‖·‖

    with U(·) the unit vector and ⁻ᵀ the pseudoinverse of the transpose. Its length is the sum of
    the projections, short where the losses disagree. A penalty's gradient includes its coefficient,
    which changes the length alone. Gradients that exactly oppose one another give 0. As in the
    code, singular values below the dtype's epsilon times the number of parameters count as 0.

    Raises:
        ValueError: at the first step, for a run with one loss.

    Source: "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", arXiv
    2408.11104; https://github.com/tum-pbs/ConFIG, `conflictfree/grad_operator.py` (`ConFIG_update`
    with its default `EqualWeight` and `ProjectionLength`).
    """

    def __call__(
        self,
        objective: nn.Module,
        model: nn.Module,
        microbatches: list[Batch],
        backward: Backward,
    ) -> Losses:
        losses, gradients = part_gradients(objective, model, microbatches, backward)
        put(conflict_free(list(gradients.values())), objective, backward)
        return losses


class MomentumConFIG:
    """M-ConFIG: ConFIG of running means of the parts' gradients, one of which is computed a step.

    Step t backpropagates part t mod m alone and moves its mean mᵢ (β₁, bias-corrected by how often
    it moved). Of ConFIG's g of the means, which stands for a bias-corrected mean of gradients, the
    newest of these is told apart, and its squares have a running mean s (β₂):

        f_t = (1 − β₁ᵗ)·g,   s ← β₂·s + (1 − β₂)·((f_t − β₁·f_{t−1}) / (1 − β₁))²

    The gradient left is g / (√(s / (1 − β₂ᵗ)) + 1e-8), a step of Adam's sort, for SGD without
    momentum and without clipping; t counts from the step at which every part has a mean, before
    which it is 0. The losses returned are each part's last. In one process the other parts are not
    computed; in several they are, and count 0 times.

    Args:
        betas: β₁ and β₂; 0.9 and 0.999 as in the code.

    Raises:
        ValueError: for a β outside [0, 1); at the first step, for a run with one loss.

    Source: as `ConFIG`'s; `conflictfree/momentum_operator.py` (`PseudoMomentumOperator`).
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: must be in [0, 1), got {list(betas)}")
        self.betas, self.step, self.moves = betas, 0, 0
        self.losses: dict[str, Tensor] = {}
        self.means: dict[str, Gradient] = {}
        self.last: Gradient = []
        self.squares: Gradient = []

    def __call__(
        self,
        objective: nn.Module,
        model: nn.Module,
        microbatches: list[Batch],
        backward: Backward,
    ) -> Losses:
        parts = names(objective)
        name = parts[self.step % len(parts)]
        losses = backprop(objective, model, microbatches, backward, name)
        gradient = take(objective, backward)
        if not products([gradient]).isfinite():  # fp16's loss scale is too large: no step
            put(gradient, objective, backward)
            return losses
        self.losses[name] = losses.parts[name]
        self._place(objective)
        self._move(name, gradient)
        self.step += 1
        if len(self.means) == len(parts):
            gradient = self._direction(parts)
        else:
            gradient = combine([0.0], [gradient])
        put(gradient, objective, backward)
        return self._losses(objective)

    @torch.no_grad()
    def _move(self, name: str, gradient: Gradient) -> None:
        beta = self.betas[0]
        before = self.means.get(name, [torch.zeros_like(g) for g in gradient])
        self.means[name] = combine([beta, 1 - beta], [before, gradient])

    @torch.no_grad()
    def _direction(self, parts: list[str]) -> Gradient:
        """What the optimizer is to subtract."""
        (first, second), turn, count = self.betas, self.step, len(parts)
        self.moves += 1
        corrected = []
        for i, name in enumerate(parts):
            moved = (turn + count - 1 - i) // count  # how often this mean has
            corrected.append(combine([1 / (1 - first**moved)], [self.means[name]]))
        gradient = conflict_free(corrected)
        zeros = [torch.zeros_like(g) for g in gradient]
        mean = combine([1 - first**self.moves], [gradient])
        newest = combine([1 / (1 - first), -first / (1 - first)], [mean, self.last or zeros])
        squares = [g.square() for g in newest]
        self.squares = combine([second, 1 - second], [self.squares or zeros, squares])
        self.last = mean
        scale = 1 - second**self.moves
        return [g / ((s / scale).sqrt() + 1e-8) for g, s in zip(gradient, self.squares)]

    def _losses(self, objective: nn.Module) -> Losses:
        counts = coefficients(objective)
        terms = [counts[name] * loss for name, loss in self.losses.items()]
        return Losses(torch.stack(terms).sum(), dict(self.losses))

    def _place(self, objective: nn.Module) -> None:
        """Put what a checkpoint held where the parameters are."""
        device = trained(objective)[0].device
        self.losses = {name: loss.to(device) for name, loss in self.losses.items()}
        self.means = {name: placed(mean, objective) for name, mean in self.means.items()}
        self.last, self.squares = placed(self.last, objective), placed(self.squares, objective)

    def state_dict(self) -> dict[str, Any]:
        """Counts, last losses and running means."""
        held = ("step", "moves", "losses", "means", "last", "squares")
        return {name: getattr(self, name) for name in held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        for name, value in state.items():
            setattr(self, name, dict(value) if isinstance(value, dict) else value)


@torch.no_grad()
def conflict_free(gradients: list[Gradient]) -> Gradient:
    """ConFIG's combination of gradients."""
    size, dtype = sum(g.numel() for g in gradients[0]), gradients[0][0].dtype
    found = weights(products(gradients), torch.finfo(dtype).eps * size)
    return combine(found.tolist(), gradients)


def weights(gram: Tensor, tolerance: float) -> Tensor:
    """How often ConFIG's has each of the gradients with these dot products, (m, m) to (m,).

    U(g₁), ..., U(gₘ) are the rows of a matrix A; u is along the shortest x that solves Ax = 1 best,
    which is Aᵀ(AAᵀ)⁺1.

    Args:
        gram: float64.
        tolerance: relative, of A's singular values.
    """
    if not gram.isfinite().all():
        return torch.full_like(gram[0], torch.nan)
    norms = gram.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0)
    units = gram * inverse * inverse[:, None]
    cutoff = max(tolerance**2, len(gram) * torch.finfo(gram.dtype).eps)
    along = torch.linalg.pinv(units, rtol=cutoff, hermitian=True).sum(1)
    cosines = units @ along
    square = along @ cosines  # of x's length
    if square <= 0:
        return torch.zeros_like(along)
    return (norms @ cosines / square) * along * inverse
