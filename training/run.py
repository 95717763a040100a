"""One training run: its parts, its folder and its progress."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.configs import Config
from training.data import StepBatches
from training.metrics import MetricsFile
from training.objective import Batch, Losses, Objective
from training.packing import Grid


@dataclass
class Run:
    """What callbacks and post steps see of a run.

    `step` counts finished optimizer steps. `microbatches` are the last step's, `batch` the last of
    them, `losses` that step's. `model` is the plain model, `objective` the module around it, and
    `wrapped` the same as several processes share it. `seconds` and `count` (of the task's unit) are
    what training has taken so far; `evaluation` is the last one, with its step; `last` every
    metric's last value. `grids` are what `post` has put parameters of `model` on, by name.
    """

    config: Config
    task: Any
    model: nn.Module
    objective: Objective
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    gradient: Any
    transforms: dict[str, Any]
    callbacks: dict[str, Any]
    post: dict[str, Any]
    batches: StepBatches
    eval_loss: Any
    accelerator: Accelerator
    folder: Path = field(init=False)
    metrics: MetricsFile = field(init=False)
    step: int = 0
    microbatches: list[Batch] = field(default_factory=list)
    batch: Batch = field(default_factory=dict)
    losses: Losses | None = None
    seconds: float = 0.0
    count: int = 0
    best: float | None = None
    evaluation: tuple[int, dict[str, float]] = (0, {})
    last: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    recorded: dict[str, float] = field(default_factory=dict)
    window: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)

    def open(self, folder: Path) -> None:
        """Keep the run's files in `folder`, which exists."""
        self.folder, self.metrics = folder, MetricsFile(folder, self.main)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.accelerator.device

    @property
    def max_steps(self) -> int:
        """Optimizer steps the run is to take."""
        return self.config["trainer"]["max_steps"]

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.accelerator.is_main_process

    def record(self, values: dict[str, float]) -> None:
        """Put values on this step's line of `metrics.jsonl`, which is written even out of turn."""
        self.recorded |= values

    def stop(self, reason: str) -> None:
        """End training after this step."""
        self.stopped = self.stopped or reason

    def stateful(self) -> dict[str, Any]:
        """The parts, beside model and optimizer, whose state a checkpoint keeps, by name."""
        parts = {"schedule": self.schedule, "gradient": self.gradient}
        parts |= {f"callback/{name}": callback for name, callback in self.callbacks.items()}
        parts |= {f"transform/{name}": transform for name, transform in self.transforms.items()}
        parts["sampler"] = self.batches.sampler
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        return {
            name: part
            for name, part in parts.items()
            if hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
        }
