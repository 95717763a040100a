"""Whether a run's steps are downhill for each of its losses."""

from typing import TYPE_CHECKING

import torch

from techniques.gradient import parts
from techniques.gradient.sam import frozen_statistics
from training.trainer import Backward

if TYPE_CHECKING:
    from training.run import Run


class Conflict:
    """Records the cosine of the gradient that the optimizer gets to the gradient of each part of
    the loss, as `probe/cosine/<part>`, and the least of them, as `probe/cosine`; above 0, a small
    step along it lowers every loss. The parts' gradients are those of the step's own batch.

    Every measurement costs a backward of each part; neither the run's gradient, nor random numbers,
    nor running statistics change.

    Args:
        every: steps between measurements.

    Raises:
        ValueError: for fewer than one step; at the first measurement, for a run with one loss.
    """

    def __init__(self, every: int = 20) -> None:
        if every < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        self.every = every

    def on_gradients(self, run: "Run") -> None:
        """Measure when it is time, before the step is finished."""
        if (run.step + 1) % self.every:
            return
        backward = Backward(None)
        mine = parts.take(run.objective, backward)
        devices = [run.device] if run.device.type == "cuda" else []
        with torch.random.fork_rng(devices), frozen_statistics(run.model):
            _, found = parts.part_gradients(run.wrapped, run.model, run.microbatches, backward)
        dots = parts.products([mine, *found.values()])
        parts.put(mine, run.objective, backward)
        lengths = dots.diagonal().sqrt()
        cosines = (dots[0] / (lengths[0] * lengths).clamp(min=1e-30))[1:].tolist()
        values = {f"probe/cosine/{name}": value for name, value in zip(found, cosines)}
        run.record({"probe/cosine": min(cosines), **values})
