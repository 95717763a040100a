"""How far a gradient estimator is from exact backpropagation."""

import contextlib
import copy
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from techniques.callback.probing import exact
from training.data import mix, move
from training.errors import UsageError
from training.objective import Batch, backprop
from training.trainer import Backward

if TYPE_CHECKING:
    from training.run import Run

DROPOUT = nn.modules.dropout._DropoutNd


class Estimator:
    """Records the bias and variance of the run's gradient estimator against exact backpropagation
    on the step's own micro-batches, at some moments of training, before that step's update:

        estimator/bias            ‖mean − exact‖ / ‖exact‖, the mean being that of the draws
        estimator/bias_error      √(variance / draws): what an unbiased estimator's bias is about
        estimator/variance        E‖g − E g‖² / ‖exact‖², without the draws' own bias
        estimator/cosine          of the mean with exact
        estimator/batch_variance  as `variance`, of exact gradients of other training batches of the
                                  step's size, still over the norm of this step's
        estimator/seconds         what the measurement took

    A gradient is that of all trained parameters as one vector, before clipping. Exact is
    `training.objective.backprop` with layers that make gradients random told to be exact
    (`probing.exact`). Every draw starts in the state that the step will start in, with other random
    numbers: torch's, and the estimator's `seed` where it has one. Dropout is off throughout, since
    its noise is the loss's, not the estimator's. Neither random state, nor weights, buffers or the
    estimator's state are changed, so that the run's losses are those without the probe, to the bit.

    A moment costs `draws` gradients of the estimator and 1 + `batches` of backpropagation, and four
    vectors of the model's size in float64; other steps cost nothing. It is part of `seconds`.

    Args:
        at: moments, as fractions of the run's steps; 0 is the first step, 1 the last.
        draws: of the estimator; 2 are enough for one that is not random.
        batches: others, which would come next; 0 leaves `batch_variance` out, as it must be for
            losses that need what a callback puts into the batch (a teacher's outputs).

    Raises:
        ValueError: for a moment outside [0, 1], fewer than 2 draws or a single other batch.
        UsageError: at the start, in several processes.
    """

    def __init__(
        self, at: Sequence[float] = (0.0, 0.5, 1.0), draws: int = 16, batches: int = 8
    ) -> None:
        if not all(0 <= moment <= 1 for moment in at):
            raise ValueError(f"at: must be fractions from 0 to 1, got {list(at)}")
        if draws < 2:
            raise ValueError(f"draws: must be at least 2, got {draws}")
        if batches < 0 or batches == 1:
            raise ValueError(f"batches: must be 0 or at least 2, got {batches}")
        self.at, self.draws, self.batches = tuple(at), draws, batches

    def on_fit_start(self, run: "Run") -> None:
        """Refuse several processes."""
        if run.accelerator.num_processes > 1:
            raise UsageError("callbacks: the estimator probe works in one process only")

    def on_batch(self, run: "Run") -> None:
        """Measure when it is time."""
        last = run.max_steps - 1
        if run.step in {min(round(moment * run.max_steps), last) for moment in self.at}:
            run.record(measure(run, self.draws, self.batches))


def measure(run: "Run", draws: int, batches: int = 0) -> dict[str, float]:
    """What `Estimator` records, of a run whose step is about to begin; nothing where the exact
    gradient is 0 or not finite."""
    begin = time.monotonic()
    with _undisturbed(run):
        reference = exact_gradient(run, run.microbatches)
        scale = reference.norm().item()
        if not 0 < scale < math.inf:
            return {}
        estimates = Moments()
        for number in range(draws):
            estimates.add(_draw(run, number))
        error = (estimates.mean - reference).norm().item() / scale
        variance = estimates.variance / scale**2
        cosine = nn.functional.cosine_similarity(estimates.mean, reference, dim=0).item()
        found = {
            "bias": error,
            "bias_error": math.sqrt(variance / draws),
            "variance": variance,
            "cosine": cosine,
        }
        if batches:
            others = Moments()
            for number in range(1, batches + 1):
                batch = [move(part, run.device) for part in run.batches[run.step + number]]
                others.add(exact_gradient(run, batch))
            found["batch_variance"] = others.variance / scale**2
    found["seconds"] = time.monotonic() - begin
    return {f"estimator/{name}": value for name, value in found.items()}


class Moments:
    """Mean and variance of vectors met one after another (Welford's recurrences, in float64)."""

    def __init__(self) -> None:
        self.count, self.squares = 0, 0.0
        self.mean = torch.zeros(())

    def add(self, vector: Tensor) -> None:
        """Meet one more."""
        self.count += 1
        before = vector - self.mean
        self.mean = self.mean + before / self.count
        self.squares += torch.dot(before, vector - self.mean).item()

    @property
    def variance(self) -> float:
        """E‖v − E v‖², unbiased."""
        return self.squares / (self.count - 1)


def exact_gradient(run: "Run", microbatches: list[Batch]) -> Tensor:
    """The gradient of backpropagation through exact layers, as one vector in float64."""
    with exact(run.objective):
        backprop(run.wrapped, run.model, microbatches, Backward(run.accelerator.scaler))
    return _take_gradient(run.objective)


def _draw(run: "Run", number: int) -> Tensor:
    """One gradient of the run's estimator, which is left as it was."""
    gradient = run.gradient
    state = copy.deepcopy(gradient.state_dict()) if hasattr(gradient, "state_dict") else None
    seed = getattr(gradient, "seed", None)
    if isinstance(seed, int):
        gradient.seed = mix(seed + 1, number)
    with _kept(run.objective):
        gradient(run.wrapped, run.model, run.microbatches, Backward(run.accelerator.scaler))
    if isinstance(seed, int):
        gradient.seed = seed
    if state is not None:
        gradient.load_state_dict(state)
    return _take_gradient(run.objective)


def _take_gradient(objective: nn.Module) -> Tensor:
    """The gradient of all trained parameters as a vector; afterwards they have none."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    vector = torch.cat([g.detach().flatten().double() for g in grads])
    objective.zero_grad(set_to_none=True)
    return vector


@contextlib.contextmanager
def _undisturbed(run: "Run") -> Iterator[None]:
    """Within it dropout is off and nothing is compiled; afterwards random state, parameters and
    buffers are as before."""
    devices = [run.device] if run.device.type == "cuda" else []
    dropout = [m for m in run.objective.modules() if isinstance(m, DROPOUT) and m.training]
    for layer in dropout:
        layer.eval()
    try:
        with (
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),
            _kept(run.objective),
        ):
            yield
    finally:
        for layer in dropout:
            layer.train()


@contextlib.contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Afterwards parameters and buffers have the values they had."""
    tensors: list[Any] = [*module.parameters(), *module.buffers()]
    values = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values):
                tensor.copy_(value)
