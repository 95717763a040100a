"""LOBSTER: weights to which the loss is insensitive shrink, and are pruned."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.evaluate import evaluate
from training.parallel import like, local, whole

if TYPE_CHECKING:
    from training.run import Run

LAYERS = (nn.Linear, nn.Conv2d, nn.BatchNorm2d)


class Lobster:
    """After each optimizer step, w ← w − λ·w·max(0, 1 − |∂L/∂w|), of the weights and biases of
    linear, convolutional and batch norm layers; where the loss no longer falls, the small are
    pruned for good.

    As in the code w is the weight after the step, and λ not multiplied by the learning rate. The
    gradient is the one the optimizer takes, clipped if `trainer.clip_norm` says so, which the
    authors' is not. λ = 0 is magnitude pruning alone.

    The loss has stopped falling after `patience` evaluations of which none was better than 1.01
    times the best since the last pruning. The best one's weights are then restored, and those with
    |w| < T become and stay 0; T is found by bisection, from the mean over layers of the mean |w|,
    until the losses at its ends are within 5% of the bound or T within 1e-10. The loss at the lower
    end is at most 1 + `tolerance` times what it was; T, as in the code, is the middle. The pruned
    model is evaluated again, and those metrics are the step's. Records `probe/sparsity`, the share
    of 0 among these parameters.

    The validation set is the task's: what pruning is decided on is also what is reported. The code
    freezes every parameter that is exactly 0 at the start of an epoch, fresh biases of batch norm
    among them; here only what was pruned is frozen. Checkpoints have the best weights too.

    Args:
        coefficient: λ; 1e-4 as in the code and its example.
        tolerance: relative rise of the validation loss that pruning may cost; 0.05 as in the code's
            example.
        patience: evaluations; 20 as in the code's example, which evaluates after each epoch.

    Raises:
        ValueError: for a negative argument; at the start, for a model without such layers.

    Source: "LOss-Based SensiTivity rEgulaRization: towards deep sparse neural networks", arXiv
    2011.09905; https://github.com/EIDOSLAB/LOBSTER, `src/utilities/pruning/sensitivity/LOBSTER.py`,
    `src/utilities/pruning/thresholding/threshold_scheduler.py` and `plateau_scheduler.py`.
    """

    def __init__(
        self, coefficient: float = 1e-4, tolerance: float = 0.05, patience: int = 20
    ) -> None:
        given = {"coefficient": coefficient, "tolerance": tolerance, "patience": patience}
        for name, value in given.items():
            if value < 0:
                raise ValueError(f"{name}: must not be negative, got {value}")
        self.coefficient, self.tolerance, self.patience = coefficient, tolerance, patience
        self.best, self.waited, self.pruned = math.inf, 0, False
        self.weights: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.zeros: dict[str, Tensor] = {}

    def on_fit_start(self, run: "Run") -> None:
        """Look for the layers, and in a resumed run for what was pruned."""
        if not prunable(run.model):
            raise ValueError("callbacks.lobster: the model has no linear or convolutional layer")
        self._note_zeros(run)

    def on_gradients(self, run: "Run") -> None:
        """Keep the gradients, which are gone after the step."""
        found = prunable(run.model).items()
        self.gradients = {name: local(p.grad) for name, p in found if p.grad is not None}

    @torch.no_grad()
    def on_step_end(self, run: "Run") -> None:
        """Shrink, and keep at 0 what is pruned."""
        for name, parameter in prunable(run.model).items():
            weight = local(parameter.detach())
            if name in self.gradients:
                shrink(weight, self.gradients[name], self.coefficient)
            if name in self.zeros:
                weight.masked_fill_(self.zeros[name], 0)
        self.gradients = {}

    @torch.no_grad()
    def on_eval_end(self, run: "Run") -> None:
        """Prune when the validation loss has stopped falling."""
        if self._waited_enough(run):
            _load(run.model, self.weights)
            self.best, self.waited, self.weights = math.inf, 0, {}
            prune(run.model, self._threshold(run))
            self.pruned = True
            self._note_zeros(run)
            run.evaluation = run.step, evaluate(run)
            run.record(run.evaluation[1])
        run.record({"probe/sparsity": sparsity(run.model)})

    def _note_zeros(self, run: "Run") -> None:
        if self.pruned:
            self.zeros = {name: local(p.detach()) == 0 for name, p in prunable(run.model).items()}

    def _waited_enough(self, run: "Run") -> bool:
        loss = run.evaluation[1]["val/loss"]
        self.waited = 0 if loss < 1.01 * self.best else self.waited + 1
        if loss < self.best:
            state = run.model.state_dict()
            self.best = loss
            self.weights = {name: value.detach().clone() for name, value in state.items()}
        return self.waited >= self.patience and bool(self.weights)

    def _threshold(self, run: "Run") -> float:
        """T, for the weights as they are."""
        kept = {name: local(p.detach()).clone() for name, p in prunable(run.model).items()}

        def loss_at(threshold: float) -> float:
            prune(run.model, threshold)
            loss = evaluate(run)["val/loss"]
            for name, parameter in prunable(run.model).items():
                local(parameter.detach()).copy_(kept[name])
            return loss

        found = [p for name, p in prunable(run.model).items() if "weight" in name]
        sizes = [s for s in map(_sizes, found) if len(s)]
        if not sizes:
            return 0.0
        start = (
            min(s.min().item() for s in sizes),
            sum(s.mean().item() for s in sizes) / len(sizes),
            max(s.max().item() for s in sizes),
        )
        return bisect(loss_at, evaluate(run)["val/loss"], self.tolerance, start)

    def state_dict(self) -> dict[str, Any]:
        """How long the loss has not fallen, and the best weights since the last pruning."""
        return {
            **{"best": self.best, "waited": self.waited, "pruned": self.pruned},
            "weights": dict(self.weights),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.best, self.waited, self.pruned = state["best"], state["waited"], state["pruned"]
        self.weights = dict(state["weights"])


def bisect(
    loss_at: Callable[[float], float],
    loss: float,
    tolerance: float,
    start: tuple[float, float, float],
) -> float:
    """The threshold at which `loss_at` it is about `1 + tolerance` times `loss`, the loss without.

    Args:
        start: the smallest, the mean and the largest weight, which it starts from.
    """
    least, mean, most = start
    bound = (1 + tolerance) * loss
    low, low_loss, high, high_loss = least, loss, mean, loss_at(mean)
    if high_loss < bound:
        low, low_loss, high, high_loss = mean, high_loss, most, math.inf
    before = math.inf
    while not abs(low_loss - high_loss) < 0.05 * bound:
        middle = (low + high) / 2
        if abs(before - middle) <= 1e-10:
            return low
        before, found = middle, loss_at(middle)
        if found <= bound:
            low, low_loss = middle, found
        else:
            high, high_loss = middle, found
    return (low + high) / 2


def shrink(weight: Tensor, gradient: Tensor, coefficient: float) -> None:
    """w ← w − λ·w·max(0, 1 − |gradient|), in place; not where fp16's gradient has overflowed."""
    insensitivity = (1 - gradient.abs()).clamp(min=0).nan_to_num(nan=0.0)
    weight.sub_(coefficient * weight * insensitivity)


def prune(model: nn.Module, threshold: float) -> None:
    """Set what is below the threshold to 0."""
    for parameter in prunable(model).values():
        weight = local(parameter.detach())
        weight.masked_fill_(weight.abs() < threshold, 0)


def sparsity(model: nn.Module) -> float:
    """The share of 0 among the parameters that can be pruned."""
    found = [whole(p.detach()) for p in prunable(model).values()]
    return sum(int((p == 0).sum()) for p in found) / sum(p.numel() for p in found)


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of linear, convolutional and batch norm layers, by name."""
    layers = {id(p) for m in model.modules() if isinstance(m, LAYERS) for p in m.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in layers}


def _sizes(weight: Tensor) -> Tensor:
    """The magnitudes that are not 0."""
    sizes = whole(weight.detach()).abs()
    return sizes[sizes > 0]


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict(
        {n: v if isinstance(v, DTensor) else like(v, own[n]) for n, v in weights.items()}
    )
