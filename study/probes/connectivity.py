"""Whether the weights of two runs are in one basin of the loss."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from study import probe_figures
from study.probes import moving
from study.probes.alignment import aligned, hidden_units
from study.probes.representations import represent
from techniques.callback import probing
from training import checkpoint
from training.errors import UsageError

if TYPE_CHECKING:
    from training.run import Run

State = dict[str, Tensor]


class Connectivity:
    """After the last step, compares the run's weights θ with the newest ones of another run, θ':

        probe/distance          ‖θ − θ'‖₂ over the trained parameters
        probe/barrier           L(α*) − (1 − α*)·L(0) − α*·L(1), where L(α) is the loss at
                                (1 − α)·θ + α·θ' and α* where L is largest
        probe/aligned_distance  with `align`, the same two with the hidden units of θ' in the order
        probe/aligned_barrier   that is nearest to θ (`study.probes.alignment`)
        probe/cka               with `cka`, linear CKA of what the two give the head: 1 when they
                                are equal but for a rotation and a scale

    Two runs are linearly mode connected when there is no barrier. Its authors take the mean of L(0)
    and L(1) away, which is the same where these are equal; what is taken here is what
    "The Butterfly Effect", arXiv 2506.13234, takes, and 0 on a line without a bump.

    The loss is the task's mean loss, without penalties, over evenly spaced training samples, the
    model in evaluation mode; a model with batch norms has their statistics measured anew at every
    point, on these samples. L(α) and seconds are in `probes/connectivity.npz` of the run's folder,
    the picture is `probes/connectivity.png`.

    A measurement costs `points` forwards of `samples` samples, as many again with `align` or batch
    norms, two with `cka`, no backward, and four copies of the weights; other steps cost nothing. It
    leaves no trace in the run.

    Args:
        to: folder of the other run, whose model is the same; in a recipe `runs` gives it.
        points: of the line, both ends among them; 11 as the authors of the latter.
        samples: of the training set, all in one batch.
        align: whether to align hidden units too, of an MLP.
        cka: whether to compare features too, of a model that gives one vector of them a sample.

    Raises:
        ValueError: for a number out of its range.
        UsageError: for a folder without a checkpoint, at the start, for a model that cannot be
            aligned or under FSDP2, and at the end, for another model.

    Source: "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671, section
    2; https://github.com/gsaltintas/lmc, `lmc/utils/lmc_utils.py` (`barrier_from_df`); CKA of
    "Similarity of Neural Network Representations Revisited", arXiv 1905.00414, of which that
    repository reports the arc cosine.
    """

    def __init__(
        self,
        to: str,
        points: int = 11,
        samples: int = 512,
        align: bool = False,
        cka: bool = False,
    ) -> None:
        if points < 3:
            raise ValueError(f"points: must be at least 3, got {points}")
        if samples < 1:
            raise ValueError(f"samples: must be at least 1, got {samples}")
        if not checkpoint.found(Path(to)):
            raise UsageError(f"callbacks.connectivity.to: no checkpoint in {to}")
        self.to, self.points, self.samples = to, points, samples
        self.align, self.cka = align, cka

    def on_fit_start(self, run: "Run") -> None:
        """Refuse what cannot be measured."""
        probing.refuse_shards(run, "linear mode connectivity")
        if self.align:
            hidden_units(run.model)

    @torch.no_grad()
    def on_eval_end(self, run: "Run") -> None:
        """Measure when training is over."""
        if run.step < run.max_steps:
            return
        started = time.monotonic()
        batch = probing.training_batch(run, self.samples)
        with moving.movable(run) as parameters:
            ours = state_of(run.model)
            features = self._features(run)
            checkpoint.load_weights(run.model, Path(self.to), "callbacks.connectivity.to")
            ends = {"": state_of(run.model)}
            found = {}
            if self.cka:
                found["probe/cka"] = linear_cka(features, self._features(run))
            if self.align:
                ends["aligned_"] = aligned(hidden_units(run.model), ours, ends[""])
            lines = {name: self._line(run, batch, ours, theirs) for name, theirs in ends.items()}
        for name, theirs in ends.items():
            found[f"probe/{name}distance"] = distance(ours, theirs, list(parameters))
            found[f"probe/{name}barrier"] = barrier(lines[name])
        run.record(found)
        arrays = {f"{name}losses": losses for name, losses in lines.items()}
        drawn = probe_figures.lines({run.config["name"]: [arrays]})
        moving.keep(run, "connectivity", drawn, **arrays, seconds=time.monotonic() - started)

    def _features(self, run: "Run") -> Tensor:
        if not self.cka:
            return torch.empty(0)
        return represent(run, run.task.train, self.samples).features

    def _line(self, run: "Run", batch: dict[str, Any], ours: State, theirs: State) -> np.ndarray:
        """The loss at every point from ours to theirs."""
        state, found = dict(run.model.state_dict()), []
        for share in np.linspace(0, 1, self.points):
            for name in ours:
                state[name].copy_(torch.lerp(ours[name], theirs[name], float(share)))
            _measure_norms(run, batch)
            found.append(moving.loss_of(run, batch))
        return np.array(found)


def state_of(model: nn.Module) -> State:
    """A copy of what is real in a model's state."""
    return {n: t.clone() for n, t in model.state_dict().items() if t.is_floating_point()}


def distance(ours: State, theirs: State, names: list[str]) -> float:
    """‖θ − θ'‖₂ over the tensors named."""
    squares = [(ours[n].double() - theirs[n].double()).square().sum() for n in names]
    return float(torch.stack(squares).sum().sqrt())


def barrier(losses: np.ndarray) -> float:
    """How far the largest of losses on an even line is over the line between its ends."""
    top = int(np.argmax(losses))
    share = top / (len(losses) - 1)
    return float(losses[top] - (1 - share) * losses[0] - share * losses[-1])


def linear_cka(x: Tensor, y: Tensor) -> float:
    """‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖) in Frobenius norms, of features (samples, width) less their means;
    the widths may differ."""
    x, y = (z - z.mean(0) for z in (x.double(), y.double()))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def _measure_norms(run: "Run", batch: dict[str, Any]) -> None:
    """Give batch norms the statistics of a batch; nothing without them."""
    with probing.looking(run):
        torch.optim.swa_utils.update_bn([batch], run.objective)
