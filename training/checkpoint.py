"""Checkpoints: written whole or not at all, checked when read, and never executed.

A checkpoint is a folder `checkpoints/step-<n>` with `model.safetensors` (the model alone),
`training.pt` (everything else; tensors and plain containers, read with `weights_only`) and
`manifest.json` (their SHA-256). It is written under a temporary name and renamed.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from training.errors import EnvironmentFault, UsageError
from training.files import write_atomically

if TYPE_CHECKING:
    from training.run import Run

FILES = ("model.safetensors", "training.pt")
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""A full disk, as Python, torch and safetensors report it."""


class Damaged(Exception):
    """A checkpoint whose files are missing or differ from its manifest."""


def found(folder: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    steps = (folder / "checkpoints").glob("step-*")
    return sorted(steps, key=lambda path: path.name, reverse=True)


def best(folder: Path) -> Path | None:
    """The checkpoint with the best monitored metric, if one was written."""
    pointer = folder / "checkpoints" / "best.json"
    if not pointer.exists():
        return None
    return pointer.parent / json.loads(pointer.read_text())["checkpoint"]


def save(run: "Run") -> Path:
    """Write the run's checkpoint for its current step. All processes call it, one writes.

    Raises:
        EnvironmentFault: when the disk refuses; earlier checkpoints stay as they are.
    """
    parent = run.folder / "checkpoints"
    final = parent / f"step-{run.step:08d}"
    temporary = parent / f".{final.name}.{os.getpid()}.tmp"
    state = _training_state(run)
    if not run.main:
        return final
    try:
        temporary.mkdir(parents=True)
        save_model(run.model, str(temporary / FILES[0]))
        torch.save(state, temporary / FILES[1])
        manifest = {name: _digest(temporary / name) for name in FILES}
        write_atomically(temporary / "manifest.json", json.dumps(manifest))
        for name in FILES:
            _flush(temporary / name)
        if final.exists():
            shutil.rmtree(final)
        temporary.replace(final)
    except WRITE_ERRORS as error:
        raise EnvironmentFault(f"cannot write checkpoint {final}: {_reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write the model alone, as safetensors.

    Raises:
        EnvironmentFault: when the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(path))
    except WRITE_ERRORS as error:
        raise EnvironmentFault(f"cannot write {path}: {_reason(error)}") from error


def mark_best(run: "Run", checkpoint: Path) -> None:
    """Remember that this checkpoint is the best so far."""
    monitor = run.config["trainer"]["monitor"]
    pointer = {"checkpoint": checkpoint.name, "step": run.step, monitor: run.best}
    write_atomically(checkpoint.parent / "best.json", json.dumps(pointer))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best."""
    spared = best(folder)
    for checkpoint in found(folder)[keep:]:
        if checkpoint != spared:
            shutil.rmtree(checkpoint)


def load(run: "Run", checkpoint: Path) -> None:
    """Put a run into the state a checkpoint holds.

    Raises:
        Damaged: when its files are missing, altered or unreadable.
        UsageError: when it is whole but of another model.
    """
    verify(checkpoint)
    state = torch.load(checkpoint / FILES[1], map_location="cpu", weights_only=True)
    try:
        load_model(run.model, str(checkpoint / FILES[0]), device=str(run.device))
    except RuntimeError as error:
        raise UsageError(f"{checkpoint} is of another model: {_reason(error)}") from error
    run.objective.load_state_dict(state["objective"], strict=False)
    run.optimizer.load_state_dict(state["optimizer"])
    for name, part in run.stateful().items():
        part.load_state_dict(state["parts"][name])
    run.step, run.best = state["step"], state["best"]
    run.seconds, run.count = state["seconds"], state["count"]
    run.window = {name: value.to(run.device) for name, value in state["window"].items()}
    states = state["random"]
    _set_random_state(states[run.accelerator.process_index % len(states)])


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Give a model the weights of the newest whole checkpoint of a run's folder.

    Raises:
        UsageError: when there is none, or it is of another model.
    """
    for checkpoint in found(folder):
        try:
            verify(checkpoint)
            load_model(model, str(checkpoint / FILES[0]))
        except Damaged:
            continue
        except RuntimeError as error:
            message = f"trainer.start_from: {checkpoint} is of another model: {_reason(error)}"
            raise UsageError(message) from error
        return
    raise UsageError(f"trainer.start_from: no whole checkpoint in {folder}")


def verify(checkpoint: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        Damaged: when they differ or are missing.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name in FILES:
            if _digest(checkpoint / name) != manifest[name]:
                raise Damaged(f"{checkpoint / name} does not match its checksum")
    except (OSError, ValueError, KeyError) as error:
        raise Damaged(f"{checkpoint} is incomplete: {_reason(error)}") from error


def _training_state(run: "Run") -> dict[str, Any]:
    beside_model = {
        name: value
        for name, value in run.objective.state_dict().items()
        if not name.startswith("model.")
    }
    return {
        "step": run.step,
        "best": run.best,
        "seconds": run.seconds,
        "count": run.count,
        "objective": beside_model,
        "optimizer": run.optimizer.state_dict(),
        "parts": {name: part.state_dict() for name, part in run.stateful().items()},
        "window": run.window,
        "random": gather_object([_random_state()]),
    }


def _random_state() -> dict[str, Any]:
    kind, words, *rest = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(words, dtype=np.int64)), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
