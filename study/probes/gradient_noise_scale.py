"""How noisy a batch's gradient is, and so how large a batch is useful."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from techniques.callback import probing
from techniques.gradient.sam import frozen_statistics

if TYPE_CHECKING:
    from training.objective import Batch
    from training.run import Run


class GradientNoiseScale:
    """Records, of the gradient of the run's own objective on the batch of some steps, before the
    update, with Σ the covariance of a sample's gradient and G its mean:

        probe/gradient_square  an unbiased estimate of ‖G‖²
        probe/gradient_noise   an unbiased estimate of tr Σ
        probe/noise_scale      B_simple = tr Σ / ‖G‖², in samples: the ratio of the two's
                               exponential moving averages, where the lower is positive

    Each micro-batch is divided into parts of one size (what is left over is not used); with s
    samples a part, b in all of them, of all processes, g_s a part's gradient and g_b the mean,

        ‖G‖² ≈ (b·‖g_b‖² − s·E‖g_s‖²) / (b − s),   tr Σ ≈ (E‖g_s‖² − ‖g_b‖²) / (1/s − 1/b).

    Dropout and augmentation are part of the noise. A loss that compares the samples of a batch
    has no gradient of a sample, and its noise scale no meaning.

    A measurement costs one more forward and backward of the batch, and two vectors of the model's
    size, in several processes their sum too; other steps cost nothing. It leaves no trace in the
    run.

    Args:
        every: steps between measurements.
        parts: of a micro-batch, at least 2.
        decay: of the averages, for each measurement.

    Raises:
        ValueError: for a value out of its range; at a step, for a micro-batch smaller than `parts`.
        UsageError: at the start, under FSDP2.

    Source: "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1; decay
    as in https://github.com/EleutherAI/gpt-neox,
    `megatron/gradient_noise_scale/gradient_noise_scale.py`, which averages alike, but whose ‖g_s‖²
    is of one part alone.
    """

    def __init__(self, every: int = 10, parts: int = 2, decay: float = 0.99) -> None:
        if every < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        if parts < 2:
            raise ValueError(f"parts: must be at least 2, got {parts}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: must be in [0, 1), got {decay}")
        self.every, self.parts, self.decay = every, parts, decay
        self.square = self.noise = 0.0

    def on_fit_start(self, run: "Run") -> None:
        """Refuse parameters in pieces."""
        probing.refuse_shards(run, "the gradient noise scale")

    def on_batch(self, run: "Run") -> None:
        """Measure when it is time."""
        if run.step % self.every:
            return
        square, noise = measure(run, self.parts)
        # Both begin at 0, which their ratio does not show.
        self.square = self.decay * self.square + (1 - self.decay) * square
        self.noise = self.decay * self.noise + (1 - self.decay) * noise
        found = {"gradient_square": square, "gradient_noise": noise}
        if self.square > 0:
            found["noise_scale"] = self.noise / self.square
        run.record({f"probe/{name}": value for name, value in found.items()})

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {"square": self.square, "noise": self.noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.square, self.noise = state["square"], state["noise"]


def measure(run: "Run", parts: int) -> tuple[float, float]:
    """Estimates of ‖G‖² and tr Σ from the parts of a step's micro-batches."""
    pieces = [piece for batch in run.microbatches for piece in divided(batch, parts)]
    world = run.accelerator.num_processes
    total, small = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    with _undisturbed(run):
        for piece in pieces:
            gradient = _gradient(run, piece)
            small = small + gradient.double().square().sum().cpu() / len(pieces) / world
            total = total.to(gradient) + gradient / len(pieces) / world
    if world > 1:
        total = run.accelerator.reduce(total, "sum")
        small = run.accelerator.reduce(small.to(run.device), "sum")
    assert isinstance(total, Tensor)
    assert isinstance(small, Tensor)
    big = total.double().square().sum()
    size, mean = _rows(pieces[0]), float(small)  # type: ignore[arg-type]
    return estimates(mean, float(big), size, size * len(pieces) * world)


def estimates(small: float, big: float, size: int, whole: int) -> tuple[float, float]:
    """‖G‖² and tr Σ from the mean squared norm of gradients of `size` samples, and that of the
    gradient of all `whole` samples."""
    square = (whole * big - size * small) / (whole - size)
    noise = (small - big) / (1 / size - 1 / whole)
    return square, noise


def divided(batch: "Batch", parts: int) -> list["Batch"]:
    """Parts of a batch with as many rows each.

    Raises:
        ValueError: when it has fewer rows.
    """
    rows = _rows(batch)
    size = rows // parts
    if not size:
        raise ValueError(f"parts: a micro-batch of {rows} has no {parts} parts")

    def cut(value: Any, start: int) -> Any:
        whole = isinstance(value, Tensor) and value.ndim and len(value) == rows
        return value[start : start + size] if whole else value

    starts = range(0, parts * size, size)
    return [{key: cut(value, start) for key, value in batch.items()} for start in starts]


def _rows(batch: "Batch") -> int:
    return len(batch["labels"])


def _gradient(run: "Run", batch: "Batch") -> Tensor:
    """Of all trained parameters, as one vector."""
    parameters = [p for p in run.objective.parameters() if p.requires_grad]
    with run.accelerator.autocast():
        loss = run.objective(batch).total
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


@contextlib.contextmanager
def _undisturbed(run: "Run") -> Iterator[None]:
    """Within it nothing is compiled; random state and running statistics stay as they are."""
    devices = [run.device] if run.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.compiler.set_stance("force_eager"),
        frozen_statistics(run.model),
    ):
        yield
