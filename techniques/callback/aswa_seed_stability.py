"""Aggressive stochastic weight averaging."""

import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn

from techniques.callback.averaging import Average
from training.parallel import whole

if TYPE_CHECKING:
    from training.run import Run

UPDATE = get_swa_multi_avg_fn()


class ASWA:
    """Averages the weights after every step, A ← A + (W − A)/(n + 1), n the updates so far, and
    exchanges A and W at the end of every epoch, so that training goes on from the average.

    ASWA takes every step. NASWA takes those whose distance from the average d = ‖W − A‖ (of each
    parameter, then their mean or largest) is over the mean of the distances kept in N; after one N
    is {d}, else d joins N, and at an epoch's end N is empty. The last step ends an epoch too, so
    the average is what is left. An epoch ends with the step that takes its last sample.

    As in the code, updates are counted on over epochs while A, after an exchange, is the weights
    before it (the paper's algorithm, known here from others' accounts, copies A to W and keeps A);
    the first update comes after `start` + 1 steps and ASWA counts it twice; an epoch's last
    weights join after the exchange. The code measures d on two parameters of its networks, picked
    by their position, here it is on all. Buffers are not averaged.

    Args:
        filter: null for ASWA; `mean` or `max` of the parameters' distances for NASWA.
        start: steps before the first update; 1, the README's.
        every: steps between updates; 1, the README's.

    Raises:
        ValueError: for another filter, a negative start or an `every` below 1.

    Source: "On Model Stability as a Function of Random Seed", arXiv 1909.10447;
    https://github.com/ImperialNLP/ModelStability, `model/Binary_Classification.py`, `README.md`,
    and the `SWA` of https://github.com/pytorch/contrib, `torchcontrib/optim/swa.py`.
    """

    def __init__(self, filter: str | None = None, start: int = 1, every: int = 1) -> None:
        if filter not in (None, "mean", "max"):
            raise ValueError(f"filter: null, mean or max, got {filter!r}")
        if start < 0:
            raise ValueError(f"start: must be at least 0, got {start}")
        if every < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        self.filter, self.start, self.every = filter, start, every
        self.average = Average()
        self.distances: list[float] = []

    def on_fit_start(self, run: "Run") -> None:
        """Follow the parameters."""
        self.average.follow(run.objective)

    def on_step_end(self, run: "Run") -> None:
        """Exchange at an epoch's end, then average."""
        last = run.step == run.max_steps
        if (last or _ends_epoch(run)) and self.average.averaged:
            self.average.swap()
            self.distances = []
        if not last and run.step > self.start and run.step % self.every == 0:
            self._take()

    def _take(self) -> None:
        if not self.average.averaged:
            self.average.update(UPDATE)
        if self.filter is None:
            self.average.update(UPDATE)
            return
        distance = self._distance()
        if distance > (statistics.fmean(self.distances) if self.distances else 0.0):
            self.average.update(UPDATE)
            self.distances = [distance]
        elif distance > 0:
            self.distances.append(distance)

    @torch.no_grad()
    def _distance(self) -> float:
        tensors, parameters = self.average.tensors, self.average.parameters
        norms = torch.stack([whole((tensors[n] - p).norm()) for n, p in parameters.items()])
        return float(norms.mean() if self.filter == "mean" else norms.max())

    def state_dict(self) -> dict[str, Any]:
        """The average and N."""
        return {"average": self.average.state_dict(), "distances": list(self.distances)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.average.load_state_dict(state["average"])
        self.distances = list(state["distances"])


def _ends_epoch(run: "Run") -> bool:
    """Whether the step just taken has an epoch's last sample."""
    size, length = run.config["trainer"]["batch_size"], run.batches.sampler.length
    return run.step * size // length > (run.step - 1) * size // length
