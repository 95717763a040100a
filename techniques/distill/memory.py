"""What the model said of each training sample some epochs ago."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

if TYPE_CHECKING:
    from training.run import Run

Recent = dict[int, tuple[Tensor, Tensor]]
"""Of each part of a step, which samples it has and what the model said of them first."""


class Memory:
    """Keeps the logits of every training sample, for losses that compare them with earlier ones.

    Every training batch gets `logits_<n>_ago` (rows, classes), float32: what the model said of its
    samples in the epoch n before theirs; `known_<n>_ago` (rows,), where it did, which is false in
    the first n epochs; `epoch` (rows,), each sample's, from 0; and two whole numbers: `epochs` of
    the run, the last one counted in full, and `part`, its place among the step's micro-batches.

    The logits are those of training's own forwards, augmentation and dropout included, as training
    met them. A loss or penalty hands them over by `note(self.recent, outputs, batch)`; of a
    micro-batch that goes forward twice in a step (SAM) the first counts. In several processes each
    keeps those of all. They take (4·classes + 8)·n·samples bytes of main memory and of each
    checkpoint.

    Args:
        epochs: n.

    Raises:
        ValueError: for n below 1; at the first step, where samples do not have one class each for a
            label (a language model's logits of every token would be too many to keep), or nothing
            in the objective notes its logits.
    """

    def __init__(self, epochs: int = 1) -> None:
        if epochs < 1:
            raise ValueError(f"epochs: must be at least 1, got {epochs}")
        self.epochs = epochs
        self.logits: Tensor | None = None
        self.when: Tensor | None = None

    def on_batch(self, run: "Run") -> None:
        """Tell each batch what is remembered of its samples."""
        for recorder in _recorders(run):
            recorder.recent.clear()
        for number, epoch, batch in _parts(run):
            labels = batch.get("labels")
            if labels is None or labels.ndim != 1 or labels.is_floating_point():
                raise ValueError(
                    "callbacks: logits are remembered of classification alone, one class a sample"
                )
            index, slot = batch["index"].cpu(), epoch % self.epochs
            if self.logits is None or self.when is None:
                past, known = torch.zeros(len(index), 0), torch.zeros(len(index), dtype=torch.bool)
            else:
                past = self.logits[index, slot]
                known = self.when[index, slot] == epoch - self.epochs
            trainer, length = run.config["trainer"], run.batches.sampler.length
            batch[f"logits_{self.epochs}_ago"] = past.to(run.device)
            batch[f"known_{self.epochs}_ago"] = known.to(run.device)
            batch["epoch"] = epoch.to(run.device)
            batch["epochs"] = math.ceil(trainer["max_steps"] * trainer["batch_size"] / length)
            batch["part"] = number

    def on_step_end(self, run: "Run") -> None:
        """Remember what the step's forwards, in all processes, have said."""
        recent = _recorders(run)[0].recent
        own = {
            number: (recent[number][0].cpu(), epoch, recent[number][1].float().cpu())
            for number, epoch, _ in _parts(run, run.step - 1)
            if number in recent
        }
        shards = gather_object([own]) if run.accelerator.num_processes > 1 else [own]
        parts = dict(sorted(part for shard in shards for part in shard.items()))
        if parts:
            index, epoch, logits = (torch.cat(each) for each in zip(*parts.values()))
            self.remember(len(run.task.train), index, epoch, logits)

    def remember(self, samples: int, index: Tensor, epoch: Tensor, logits: Tensor) -> None:
        """Keep one step's logits (rows, classes) of the samples `index` in their epochs (rows,)."""
        if self.logits is None or self.when is None:
            self.logits = torch.zeros(samples, self.epochs, logits.shape[-1])
            self.when = torch.full((samples, self.epochs), -1 - self.epochs)
        place = index * self.epochs + epoch % self.epochs
        # Of a sample twice in a step, as where an epoch ends in it, the last counts.
        last = len(place) - 1 - np.unique(place.flip(0).numpy(), return_index=True)[1]
        rows = torch.from_numpy(last)
        self.logits.flatten(0, 1)[place[rows]] = logits[rows]
        self.when.flatten()[place[rows]] = epoch[rows]

    def state_dict(self) -> dict[str, Any]:
        """The logits (samples, n, classes) and the epochs they are of (samples, n)."""
        return {"logits": self.logits, "when": self.when}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.logits, self.when = state["logits"], state["when"]


def note(recent: Recent, outputs: Any, batch: dict[str, Any]) -> None:
    """Keep a forward's logits until the next step, where `Memory` finds them, unless it is the
    second of its micro-batch."""
    recent.setdefault(batch["part"], (batch["index"], outputs["logits"].detach()))


def recalled(batch: dict[str, Any], epochs: int) -> tuple[Tensor, Tensor]:
    """The logits (rows, classes) of so many epochs ago, and where (rows,) there are any.

    Raises:
        ValueError: when no callback has put them in the batch.
    """
    if f"logits_{epochs}_ago" not in batch:
        raise ValueError(
            f"batch: no logits_{epochs}_ago; it needs a callback techniques.distill.memory.Memory, "
            f"epochs={epochs}"
        )
    return batch[f"logits_{epochs}_ago"], batch[f"known_{epochs}_ago"]


def _parts(run: "Run", step: int | None = None) -> list[tuple[int, Tensor, dict[str, Any]]]:
    """The micro-batches of this process with their places in the step and their rows' epochs."""
    batches = run.batches
    start = (run.step if step is None else step) * batches.batch_size
    places = torch.arange(start, start + batches.batch_size)
    shares = places.tensor_split(batches.accumulate * batches.world)
    numbers = range(batches.rank, len(shares), batches.world)
    return [(n, shares[n] // batches.sampler.length, b) for n, b in zip(numbers, run.microbatches)]


def _recorders(run: "Run") -> list[Any]:
    """The loss and penalties that note logits."""
    parts = [run.objective.loss, *(p for p, _ in run.objective.penalties.values())]
    found = [part for part in parts if hasattr(part, "recent")]
    if not found:
        raise ValueError("callbacks: a memory of logits, but no loss or penalty that notes them")
    return found
