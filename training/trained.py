"""What has trained: a run's parts with the weights that it ended with, or its model alone."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from training import checkpoint
from training.assemble import assemble, start_of
from training.components import DISTRUST, call, distrust, offered
from training.configs import Config
from training.errors import UsageError
from training.folder import read_config
from training.run import Run


def trained(folder: Path, config: Config, which: str = "last") -> tuple[Run, int]:
    """The parts of a run, its model as it was in a checkpoint, and that checkpoint's step.

    Args:
        folder: the run's.
        config: its configuration.
        which: `"best"` or `"last"` checkpoint.

    Raises:
        UsageError: without a checkpoint, or with a damaged one.
    """
    found = checkpoint.found(folder)
    chosen = (checkpoint.best(folder) if which == "best" else None) or next(iter(found), None)
    if chosen is None:
        raise UsageError(f"{folder} has no checkpoint")
    try:
        checkpoint.verify(chosen)
    except checkpoint.Damaged as damage:
        raise UsageError(
            f"{damage}; --checkpoint {'last' if which == 'best' else 'best'} may be whole"
        ) from damage
    run = assemble(config)
    checkpoint.load_model_of(chosen, run.model)
    return run, int(chosen.name.split("-")[1])


def model_of(
    source: str | Path | Callable[..., nn.Module] | None,
    accelerator: Accelerator,
    where: str,
    trust: bool = False,
    dims: dict[str, int] | None = None,
) -> tuple[nn.Module, str]:
    """A model that has trained, on the device, in evaluation mode and without gradients; and what
    it is beside its weights, for a cache's key.

    Every process calls it and has the model whole. The random state stays as it is.

    Args:
        source: a run's folder, of which it is the newest whole checkpoint, or a checkpoint's folder
            in it; its `config.yaml` says what the model is. Or a component that makes a model, as
            in `conf/model/`, in a configuration `_target_` and keys; its weights are what it
            brings (`pretrained`), else drawn from seed 0.
        accelerator: of the run that asks.
        where: the configuration key of `source`, which an error names; beside it is `trust`.
        trust: import what the folder's configuration names from whatever package; otherwise from
            known ones alone, as `assay export` does.
        dims: the task's, for a component.

    Raises:
        UsageError: without a source, for a folder without a whole checkpoint, or for a
            configuration that is not trusted.
    """
    if source is None:
        raise UsageError(f"{where}: which model? a run's folder, or a component that makes one")
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if callable(source):
            torch.manual_seed(0)
            model = call(source, where, **offered(source, dims or {}))
            about = _described(source)
        else:
            model, about = _of_folder(Path(source), accelerator, where, trust)
    return model.to(accelerator.device).eval().requires_grad_(False), json.dumps(about)


def _of_folder(
    path: Path, accelerator: Accelerator, where: str, trust: bool
) -> tuple[nn.Module, list[Any]]:
    single = path.parent.name == "checkpoints"
    try:
        with _trusting(trust):
            config = _without_start(read_config(path.parent.parent if single else path))
            torch.manual_seed(config["seed"])
            model = start_of(config, accelerator)[2]
        _load_newest([path] if single else checkpoint.found(path), model)
    except UsageError as error:
        beside = where.rpartition(".")[0]
        reason = str(error).replace("--trust", f"{beside}.trust=true")
        raise UsageError(f"{where}: {reason}") from error
    return model, [config["model"], config["reparam"]]


def _described(made: Any) -> Any:
    """A component's target and keys, components among them too."""
    if not callable(made):
        return made
    keys = {name: _described(value) for name, value in getattr(made, "keywords", {}).items()}
    target = getattr(made, "func", made)
    return [f"{target.__module__}.{target.__qualname__}", keys]


def _without_start(config: Config) -> Config:
    """The configuration without what makes no difference to weights that are loaded over it."""
    if config["reparam"]:  # made of the weights and the batches that it finds
        return config
    config = {**config, "trainer": {**config["trainer"], "start_from": None}}
    if config["init"]:  # sees a batch
        return config
    sampler = {"_target_": "training.data.Shuffled"}
    return {**config, "data": {"transforms": {}, "sampler": sampler, "batch": {}}}


def _load_newest(candidates: list[Path], model: nn.Module) -> None:
    """Give a model the weights of the first checkpoint that is whole."""
    reason = "it has no checkpoint"
    for candidate in candidates:
        try:
            checkpoint.verify(candidate)
            checkpoint.load_model_of(candidate, model)
        except checkpoint.Damaged as damage:
            reason = str(damage)
            continue
        return
    raise UsageError(reason)


@contextlib.contextmanager
def _trusting(trust: bool) -> Iterator[None]:
    """Within it, unless trusted, components come from known packages alone."""
    before = os.environ.get(DISTRUST)
    if not trust:
        distrust()
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(DISTRUST, None)
