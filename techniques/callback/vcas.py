"""What decides how much of the backward pass is sampled."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from study.probes.memory import Flops
from techniques.callback.probing import exact
from techniques.gradient.sam import frozen_statistics
from techniques.reparam.vcas import sampled_linears, samplers
from training.data import mix, move
from training.objective import Batch, backprop
from training.parallel import whole
from training.trainer import Backward

if TYPE_CHECKING:
    from training.run import Run


class VCAS:
    """Lowers or raises the ratios of `techniques.reparam.vcas`, so that sampling adds about
    τ of the variance that gradients of mini-batches have anyway, each of its two kinds.

    Every `every` steps, before the step, M batches (this one and the next) are measured on the
    linear layers' weights: V, the variance of their exact gradients; V_act, the mean squared
    distance of M gradients each with sampled samples alone from the exact one; V_w of each layer,
    what sampling rows would add, in closed form. Then

        s ← s ± δ                      + if V_act > τ_act · V
        ρ_l ← 0.6 ρ_l + 0.4 max_{j≤l} q_j     share of samples kept below block l
        ν_i ← ν_i / 0.95 if V_w,i > τ_w · V_i, else ν_i · 0.95      share of rows kept in layer i

    where q_j is the smallest share of samples whose gradients' norms at block j are a share of
    their sum. That share is, as in the code, the old s − δ where s goes up and s + δ where it goes
    down; by the names there (`act_ratio_up_sched`) it seems meant the other way round.

    A block whose ρ is that of the one above samples no further. Records, at these steps and as
    they are until then, `vcas/s`, `vcas/activation_ratio` and `vcas/weight_ratio` (means over
    blocks and layers), `vcas/activation_variance` and `vcas/weight_variance` (over V) and what the
    measurement took, M exact and M² sampled passes, as `vcas/measuring_flops`.

    Args:
        activation_tau, weight_tau: τ_act and τ_w; 0.025 each.
        every: steps between measurements; 100, and at most a fiftieth of the steps, as the authors
            recommend.
        step: δ; 0.01.
        repeats: M; 2.

    Raises:
        ValueError: for a τ or δ that is not positive, `every` below 1 or fewer than 2 repeats; at
            the start, for a model without samplers.

    Source: "Efficient Backpropagation with Variance-Controlled Adaptive Sampling", arXiv
    2402.17227; https://github.com/thu-ml/VCAS, `vcas/sample_scheme.py`, `vcas/vcas_trainer.py` and
    `vcas/sample_args.py` (the defaults). The code looks at a hundredth of the weights, here all,
    and its M sampled passes of a batch draw the same numbers, here others. Dropout is the same in
    all passes of a batch.
    """

    def __init__(
        self,
        activation_tau: float = 0.025,
        weight_tau: float = 0.025,
        every: int = 100,
        step: float = 0.01,
        repeats: int = 2,
    ) -> None:
        positive = {"activation_tau": activation_tau, "weight_tau": weight_tau, "step": step}
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        if every < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        if repeats < 2:
            raise ValueError(f"repeats: must be at least 2, got {repeats}")
        self.taus, self.every, self.step = (activation_tau, weight_tau), every, step
        self.repeats = repeats
        self.s = 1.0
        self.kept: list[float] = []
        self.rows: list[float] = []

    def on_fit_start(self, run: "Run") -> None:
        """Give the layers their ratios: 1 in a new run."""
        if not samplers(run.model):
            raise ValueError("callbacks.vcas: needs `reparam.vcas`, which gives layers to sample")
        self.kept = self.kept or [1.0] * len(samplers(run.model))
        self.rows = self.rows or [1.0] * len(sampled_linears(run.model))
        self._tell(run)

    def on_batch(self, run: "Run") -> None:
        """Measure and adapt when it is time."""
        if (run.step + 1) % self.every:
            return
        with Flops() as flops:
            found = measure(run, self.repeats, (self.s - self.step, self.s + self.step))
        activation, total = found.activation, sum(found.batch)
        run.record(
            {
                "vcas/s": self.s,
                "vcas/activation_ratio": sum(self.kept) / len(self.kept),
                "vcas/weight_ratio": sum(self.rows) / len(self.rows),
                "vcas/activation_variance": activation / max(total, 1e-30),
                "vcas/weight_variance": sum(found.weight) / max(total, 1e-30),
                "vcas/measuring_flops": float(flops.total),
            }
        )
        self._adapt(found)
        self._tell(run)

    def _adapt(self, found: "Measured") -> None:
        activation_tau, weight_tau = self.taus
        more = found.activation > activation_tau * sum(found.batch)
        self.s = min(1.0, self.s + self.step) if more else max(0.0, self.s - self.step)
        largest = 0.0
        for number, share in enumerate(found.shares[0 if more else 1]):
            largest = max(largest, share)
            self.kept[number] = 0.6 * self.kept[number] + 0.4 * largest
        for number, (added, batch) in enumerate(zip(found.weight, found.batch)):
            self.rows[number] *= 1 / 0.95 if added > weight_tau * batch else 0.95

    def _tell(self, run: "Run") -> None:
        above = [*self.kept[1:], 2.0]
        for sampler, ratio, next_ratio in zip(samplers(run.model), self.kept, above):
            sampler.ratio = ratio if ratio < next_ratio else 1.0
        for layer, ratio in zip(sampled_linears(run.model), self.rows):
            layer.ratio = ratio

    def state_dict(self) -> dict[str, Any]:
        """s and the ratios."""
        return {"s": self.s, "kept": list(self.kept), "rows": list(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.s, self.kept, self.rows = state["s"], list(state["kept"]), list(state["rows"])


@dataclass
class Measured:
    """Variances of the linear layers' weight gradients: `batch` and `weight` (V and V_w) of each
    layer, `activation` (V_act) of all; `shares`: for each share of the norms asked for, the share
    of samples that has it at each block."""

    batch: list[float]
    activation: float
    weight: list[float]
    shares: list[list[float]]


def measure(run: "Run", repeats: int, targets: tuple[float, ...]) -> Measured:
    """Measure on the step's batch and those that come next, the same in every process."""
    layers, world = sampled_linears(run.model), run.accelerator.num_processes
    devices = [run.device] if run.device.type == "cuda" else []
    seeds = torch.randint(2**62, (repeats, repeats + 1)).tolist()
    gradients: list[list[Tensor]] = []
    activation = 0.0
    shares = torch.zeros(len(targets), len(samplers(run.model)), device=run.device)
    for layer in layers:
        layer.variance = 0.0
    with torch.random.fork_rng(devices), frozen_statistics(run.model):
        for number, (first, *rest) in enumerate(seeds):
            batch = run.microbatches
            if number:
                batch = [move(part, run.device) for part in run.batches[run.step + number]]
            with exact(run.model), _watched(run, shares, targets):
                reference = _gradients(run, batch, first, 0)
            gradients.append(reference)
            for seed in rest:
                sampled = _gradients(run, batch, first, seed)
                pairs = zip(sampled, reference)
                activation += sum((a - b).square().sum().item() for a, b in pairs)
    weight = torch.tensor([layer.variance for layer in layers], device=run.device)
    for layer in layers:
        layer.variance = None
    if world > 1:  # of a mean of independent gradients, a world-th of the mean variance
        weight = run.accelerator.reduce(weight, "mean") / world
        shares = run.accelerator.reduce(shares, "mean")
    batch_variances = [torch.stack(own).var(0).sum().item() for own in zip(*gradients)]
    return Measured(
        batch_variances,
        activation / repeats**2,
        (weight / repeats**2).tolist(),  # type: ignore[union-attr]
        (shares / repeats).tolist(),  # type: ignore[union-attr]
    )


def _gradients(run: "Run", batch: list[Batch], seed: int, sampling: int) -> list[Tensor]:
    """Of the linear layers' weights, with the first seed's dropout and the other's samples."""
    devices = [run.device] if run.device.type == "cuda" else []
    backward, numbers = Backward(run.accelerator.scaler), itertools.count()

    def sampled(loss: Tensor) -> None:
        with torch.random.fork_rng(devices):
            torch.manual_seed(mix(sampling, next(numbers)))
            backward(loss)

    torch.manual_seed(seed)
    backprop(run.wrapped, run.model, batch, sampled)
    weights = [layer.weight for layer in sampled_linears(run.model)]
    found = [torch.zeros_like(w) if w.grad is None else whole(w.grad) for w in weights]
    run.objective.zero_grad(set_to_none=True)
    return found


@contextlib.contextmanager
def _watched(run: "Run", shares: Tensor, targets: tuple[float, ...]) -> Iterator[None]:
    """Add to `shares` what share of samples has each share of the norms at each block."""
    own = samplers(run.model)
    for sampler in own:
        sampler.norms = []
    yield
    for number, sampler in enumerate(own):
        norms, sampler.norms = sampler.norms, None
        if norms:
            for row, target in zip(shares, targets):
                row[number] += share_of_samples(torch.cat(norms), target)


def share_of_samples(norms: Tensor, target: float) -> float:
    """The smallest share of samples that has `target` of the norms' sum."""
    sums = norms.sort(descending=True).values.cumsum(0)
    return min((int((sums < target * norms.sum()).sum()) + 1) / len(norms), 1.0)
