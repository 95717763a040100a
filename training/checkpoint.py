"""Checkpoints: written whole or not at all, checked when read, and never executed.

A checkpoint is a folder `checkpoints/step-<n>` with `model.safetensors` (the model alone),
`training.pt` (everything else; tensors and plain containers, read with `weights_only`) and
`manifest.json` (their SHA-256). It is written under a temporary name and renamed. Under FSDP2
`shards/` has every process's part of the model and the rest, as safetensors too, and `training.pt`
what is not sharded. Either kind goes on with any number of processes.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.tensor import DTensor

from training import packing, shards
from training.errors import EnvironmentFault, UsageError
from training.files import write_atomically
from training.parallel import like, whole

if TYPE_CHECKING:
    from training.run import Run

MODEL, TRAINING, SHARDS = "model.safetensors", "training.pt", "shards"
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
    try:
        return pointer.parent / json.loads(pointer.read_bytes())["checkpoint"]
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or damaged
        return None


def save(run: "Run") -> Path:
    """Write the run's checkpoint for its current step. All processes call it.

    Raises:
        EnvironmentFault: when the disk refuses; earlier checkpoints stay as they are.
    """
    parent = run.folder / "checkpoints"
    final = parent / f"step-{run.step:08d}"
    temporary = parent / f".{final.name}.tmp"
    state, sharded = _training_state(run), {}
    if _is_sharded(run.model):
        state, sharded = shards.split({"model": run.model.state_dict(), **state})
    try:
        if run.main:
            shutil.rmtree(temporary, ignore_errors=True)  # a killed process's
            temporary.mkdir(parents=True)
            torch.save(state, temporary / TRAINING)
            if not sharded:
                save_model(run.model, str(temporary / MODEL))
        if sharded:
            run.accelerator.wait_for_everyone()
            shards.save(sharded, temporary / SHARDS)
        if run.main:
            _seal(temporary, final)
    except WRITE_ERRORS as error:
        raise EnvironmentFault(f"cannot write checkpoint {final}: {_reason(error)}") from error
    finally:
        if run.main:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _seal(temporary: Path, final: Path) -> None:
    """Note the checksums, see that all is on the disk, and give the folder its name."""
    names = _files(temporary)
    manifest = {name: _digest(temporary / name) for name in names}
    write_atomically(temporary / "manifest.json", json.dumps(manifest))
    for name in names:
        _flush(temporary / name)
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)


def save_weights(model: torch.nn.Module, path: Path, main: bool = True) -> None:
    """Write the model alone, as safetensors. All processes call it, and `main` writes.

    Raises:
        EnvironmentFault: when the disk refuses.
    """
    sharded = _is_sharded(model)
    state = {n: whole(v).contiguous() for n, v in model.state_dict().items()} if sharded else {}
    if not main:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if sharded:
            save_file(state, path)
        else:
            save_model(model, str(path))
    except WRITE_ERRORS as error:
        raise EnvironmentFault(f"cannot write {path}: {_reason(error)}") from error


def save_packed(
    model: nn.Module, grids: Mapping[str, packing.Grid], path: Path, main: bool = True
) -> int:
    """Write the model as `training.packing` does; returns the file's bytes. All processes call it,
    and `main` writes.

    Raises:
        EnvironmentFault: when the disk refuses.
    """
    packed = packing.pack(model, grids)
    try:
        if main:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, packed)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path}: {_reason(error)}") from error
    return len(packed)


def mark_best(run: "Run", checkpoint: Path) -> None:
    """Remember that this checkpoint is the best so far."""
    monitor = run.config["trainer"]["monitor"]
    pointer = {"checkpoint": checkpoint.name, "step": run.step, monitor: run.best}
    write_atomically(checkpoint.parent / "best.json", json.dumps(pointer))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best, and what a kill left behind."""
    spared = best(folder)
    for left in (folder / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
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
    state = _load_parts(checkpoint, run.model, _read_training(checkpoint))
    run.objective.load_state_dict(state["objective"], strict=False)
    run.optimizer.load_state_dict(_as_sharded(state["optimizer"], run.optimizer))
    for name, part in run.stateful().items():
        part.load_state_dict(state["parts"][name])
    run.step, run.best = state["step"], state["best"]
    run.seconds, run.count = state["seconds"], state["count"]
    run.window = {name: value.to(run.device) for name, value in state["window"].items()}
    states = state["random"]
    _set_random_state(states[run.accelerator.process_index % len(states)])


def load_model_of(checkpoint: Path, model: nn.Module) -> None:
    """Give a model the weights of a whole checkpoint, reading no more of it.

    Raises:
        Damaged: when it cannot be read.
        UsageError: when it is of another model.
    """
    sharded = (checkpoint / SHARDS).exists()  # then the rest of the state tells what is where
    weights = {"model": _read_training(checkpoint)["model"]} if sharded else {}
    _load_parts(checkpoint, model, weights)


def _read_training(checkpoint: Path) -> dict[str, Any]:
    try:
        return torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise Damaged(f"{checkpoint / TRAINING} cannot be read: {_reason(error)}") from error


def _load_parts(checkpoint: Path, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Give a model its weights; returns `state` with the tensors that are in shards."""
    try:
        if (checkpoint / SHARDS).exists():
            state = shards.join(state, checkpoint / SHARDS, model)
            model.load_state_dict(state.pop("model"))
        elif _is_sharded(model):
            _load_into_shards(model, load_file(checkpoint / MODEL))
        else:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            load_model(model, str(checkpoint / MODEL), device=str(device))
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{checkpoint} cannot be read: {_reason(error)}") from error
    except RuntimeError as error:
        raise UsageError(f"{checkpoint} is of another model: {_reason(error)}") from error
    return state


def _load_into_shards(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Each process takes its part of weights that are whole."""
    own = model.state_dict()
    result = model.load_state_dict(
        {name: like(value, own[name]) for name, value in weights.items() if name in own},
        strict=False,
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    given = {id(parameters[name]) for name in weights if name in parameters}
    # The file has a parameter that two modules share under one of its names.
    missing = [n for n in result.missing_keys if id(parameters.get(n)) not in given]
    strange = weights.keys() - own.keys()
    if missing or strange:
        raise RuntimeError(f"its parameters differ in {', '.join([*missing, *strange][:3])}")


def _as_sharded(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with its tensors sharded as the parameters they belong to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        **state,
        "state": {
            i: {
                key: like(value, parameters[i])
                if isinstance(value, torch.Tensor)
                and not isinstance(value, DTensor)
                and value.shape == parameters[i].shape
                else value
                for key, value in values.items()
            }
            for i, values in state["state"].items()
        },
    }


def load_weights(model: torch.nn.Module, folder: Path, where: str = "trainer.start_from") -> None:
    """Give a model the weights of the newest whole checkpoint of a run's folder.

    Args:
        model: changed in place.
        folder: of the run.
        where: the configuration key that names it.

    Raises:
        UsageError: when there is none, or it is of another model.
    """
    for checkpoint in found(folder):
        try:
            verify(checkpoint)
            load_model_of(checkpoint, model)
        except Damaged:
            continue
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        return
    raise UsageError(f"{where}: no whole checkpoint in {folder}")


def verify(checkpoint: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        Damaged: when they differ or are missing.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if TRAINING not in manifest:
            raise Damaged(f"{checkpoint} is incomplete: its manifest names no {TRAINING}")
        for name, digest in manifest.items():
            if _digest(checkpoint / name) != digest:
                raise Damaged(f"{checkpoint / name} does not match its checksum")
    except (OSError, ValueError, AttributeError, TypeError) as error:
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


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def _files(folder: Path) -> list[str]:
    """The files of a checkpoint, beside its manifest, as the manifest names them."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name != "manifest.json")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
