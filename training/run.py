"""One training run: its parts, its folder and its progress."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn

from training.compose import Config
from training.data import StepBatches
from training.errors import EnvironmentFault
from training.files import write_atomically
from training.metrics import MetricsFile
from training.objective import Batch, Losses, Objective

ELSEWHERE = ("outputs", "tracker", "name")
"""Keys that say where a run is kept or shown, not what it is; they are not part of its address."""


def address(config: Config) -> str:
    """Ten hex digits that name what a configuration trains."""
    what = {key: value for key, value in config.items() if key not in ELSEWHERE}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]


def new_folder(config: Config) -> Path:
    """Create `outputs/runs/<name>-<address>`, or the next free `-2`, `-3`, ... of it.

    Raises:
        EnvironmentFault: when it cannot be created.
    """
    base = Path(config["outputs"]) / "runs" / f"{config['name']}-{address(config)}"
    for number in range(1, 10_000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise EnvironmentFault(
                f"cannot create the run folder {folder}: {error.strerror}"
            ) from error
        return folder
    raise EnvironmentFault(f"{base} and 9,999 numbered copies of it exist already")


def save_config(folder: Path, config: Config, overrides: list[str]) -> None:
    """Write `config.yaml` (resolved) and `overrides.yaml` (as given)."""
    write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    write_atomically(folder / "overrides.yaml", yaml.safe_dump(overrides))


@dataclass
class Run:
    """What callbacks and post steps see of a run.

    `step` counts finished optimizer steps. `batch` is the last micro-batch, `losses` the last
    step's. `model` is the plain model, `objective` the module around it that processes share.
    """

    config: Config
    folder: Path
    task: Any
    model: nn.Module
    objective: Objective
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    gradient: Any
    callbacks: dict[str, Any]
    post: dict[str, Any]
    batches: StepBatches
    eval_loss: Any
    accelerator: Accelerator
    metrics: MetricsFile
    step: int = 0
    batch: Batch = field(default_factory=dict)
    losses: Losses | None = None
    grad_norm: Tensor | None = None
    best: float | None = None
    stopped: str | None = None
    recorded: dict[str, float] = field(default_factory=dict)
    window: dict[str, Tensor] = field(default_factory=dict)

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
        parts["sampler"] = self.batches.sampler
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        return {
            name: part
            for name, part in parts.items()
            if hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
        }
