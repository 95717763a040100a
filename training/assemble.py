"""From a configuration to the parts of a run."""

import inspect
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn

from training import checkpoint
from training.components import (
    accepts,
    call,
    component,
    factory,
    is_component,
    offered,
    target,
)
from training.compose import Config
from training.configs import options
from training.data import StepBatches, move
from training.errors import UsageError, nearest
from training.objective import Batch, Objective, inputs_of
from training.parallel import STRATEGIES, distribute
from training.run import Run

OPTIONAL = {"max_minutes": int | float, "clip_norm": int | float} | dict.fromkeys(
    ("eval_batch_size", "eval_samples"), int
)
"""Trainer keys that may be null, with the kind of number they are otherwise."""
SOURCES = ("init", "order", "batch")
"""What has a seed of its own under `seeds` (`+seeds.order=0`): the parameters at the start, the
order of samples, and what is random in a batch, such as augmentation."""
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def assemble(config: Config) -> Run:
    """Build everything a run needs, ready to train from step 0.

    Raises:
        UsageError: when parts do not fit one another.
    """
    _check_trainer(config["trainer"])
    _check_seeds(config)
    accelerator = build_accelerator(config["trainer"])
    if accelerator.num_processes > 1:
        check_strategy(config)
    set_seed(seed_of(config, "init"))
    task, batches, model, loss, transforms = start_of(config, accelerator)
    objective = Objective(
        model,
        loss,
        component(config["weighting"], "weighting"),
        _build_penalties(config["penalties"]),
        inputs_of(model),
    ).to(accelerator.device)
    eval_loss = config["task"]["eval_loss"]
    if config["trainer"]["compile"]:
        model.compile(backend=config["trainer"]["compile_backend"])
    wrapped = distribute(objective, accelerator, config["trainer"]["strategy"])
    optimizer = build_optimizer(config["optimizer"], objective)
    schedule = call(
        factory(config["schedule"], "schedule"),
        "schedule",
        optimizer,
        max_steps=config["trainer"]["max_steps"],
    )
    return Run(
        config=config,
        task=task,
        model=model,
        objective=objective,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=schedule,
        gradient=component(config["gradient"], "gradient"),
        transforms=transforms,
        callbacks=_ordered(config["callbacks"], "callbacks"),
        post=_ordered(config["post"], "post"),
        batches=batches,
        eval_loss=component(eval_loss, "task.eval_loss") if eval_loss else task.loss,
        accelerator=accelerator,
    )


def start_of(
    config: Config, accelerator: Accelerator
) -> tuple[Any, StepBatches, nn.Module, Any, dict[str, Any]]:
    """Task, batches, the model on its device as the first step finds it, the loss, and the
    transforms that the training set went through.

    Raises:
        UsageError: when they do not fit one another.
    """
    task = build_task(config["task"])
    transforms = _ordered(config["data"]["transforms"], "data.transforms")
    for name, transform in transforms.items():
        told = offered(transform, {"task": task, "accelerator": accelerator})
        task.train = call(transform, f"data.transforms.{name}", task.train, **told)
    batches = _build_batches(config, task, accelerator)

    model = build_model(config, task.dims).to(accelerator.device)
    if config["init"]:
        first = move(batches.part(0, 0), accelerator.device)  # every process the same
        for name, initialise in _ordered(config["init"], "init").items():
            call(initialise, f"init.{name}", model, first)
    if config["trainer"]["start_from"]:
        checkpoint.load_weights(model, Path(config["trainer"]["start_from"]))
    loss = task.loss
    if config["task"]["loss"]:
        loss = component(config["task"]["loss"], "task.loss", {"task": task})
    for name, reparametrise in _ordered(config["reparam"], "reparam").items():
        offers = {"batches": _calibration(batches, accelerator.device), "loss": loss}
        call(reparametrise, f"reparam.{name}", model, **offered(reparametrise, offers))
    return task, batches, model, loss, transforms


def build_accelerator(trainer: Config) -> Accelerator:
    """Accelerate for the trainer's device and precision.

    Raises:
        UsageError: for a device or a precision this machine does not have.
    """
    device = trainer["device"]
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("trainer.device: no CUDA device here; use 'cpu' or 'auto'")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if on_cpu and trainer["precision"] == "fp16":
        raise UsageError("trainer.precision: fp16 needs a GPU; use 'bf16' or 'fp32'")
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UsageError(
                f"accelerate launch: its own {name} setting is not read; use trainer.strategy"
            )
    # Accelerate keeps its state for the whole process; a second run may want another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=on_cpu, mixed_precision=PRECISIONS[trainer["precision"]])


def build_task(node: Config) -> Any:
    """The task: dataset, plain loss and metrics."""
    keys = {key: value for key, value in node.items() if key not in ("loss", "eval_loss")}
    return call(factory(keys, "task"), "task")


def build_model(config: Config, dims: dict[str, int]) -> nn.Module:
    """The model, told those of the task's dimensions that its constructor names.

    Raises:
        UsageError: when the model needs a dimension that the task does not have.
    """
    node, task = config["model"], config["choices"]["task"]
    made = factory(node, "model")
    parameters = accepts(target(node, "model"))
    if parameters is None:
        return call(made, "model", **dims)
    for name, parameter in parameters.items():
        if name in dims or name in node or parameter.default is not inspect.Parameter.empty:
            continue
        fitting = [m for m in options("model") if m != config["choices"]["model"]]
        raise UsageError(
            f"model: '{config['choices']['model']}' needs {name}, which task '{task}' does not "
            f"have (it has {', '.join(sorted(dims))}); other models: {', '.join(fitting)}"
        )
    return call(made, "model", **{k: v for k, v in dims.items() if k in parameters})


def build_optimizer(node: Config, objective: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over two groups: matrices, and what is not decayed (biases, norms, scales)."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    if not trained:
        raise UsageError("model: it has no parameter to train")
    matrices = [p for p in trained if p.ndim >= 2]
    others = [p for p in trained if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}] if matrices else []
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return call(factory(node, "optimizer"), "optimizer", groups)


def _build_batches(config: Config, task: Any, accelerator: Accelerator) -> StepBatches:
    trainer = config["trainer"]
    parts = trainer["accumulate"] * accelerator.num_processes
    if trainer["batch_size"] < parts:
        raise UsageError(
            f"trainer.batch_size: {trainer['batch_size']} samples cannot be split over "
            f"{trainer['accumulate']} micro-batches and {accelerator.num_processes} processes"
        )
    sampler = factory(config["data"]["sampler"], "data.sampler")
    told = offered(sampler, {"task": task})
    return StepBatches(
        task,
        call(sampler, "data.sampler", len(task.train), seed_of(config, "order"), **told),
        trainer["batch_size"],
        trainer["accumulate"],
        list(_ordered(config["data"]["batch"], "data.batch").values()),
        seed_of(config, "batch"),
        accelerator.process_index,
        accelerator.num_processes,
    )


def _calibration(batches: StepBatches, device: torch.device) -> Iterator[Batch]:
    """Training batches from the first on, in every process the same."""
    for step in itertools.count():
        yield move(batches.part(step, 0), device)


def _build_penalties(nodes: Config) -> dict[str, tuple[Any, float]]:
    built = {}
    for name, node in nodes.items():
        where = f"penalties.{name}"
        if not is_component(node) or "coefficient" not in node:
            raise UsageError(f"{where}: needs _target_ and coefficient")
        keys = {key: value for key, value in node.items() if key != "coefficient"}
        built[name] = (component(keys, where), float(node["coefficient"]))
    return built


def check_strategy(config: Config) -> None:
    """Refuse a technique that says it cannot train in several processes under the strategy.

    Raises:
        UsageError: with the reason its card gives.
    """
    strategy = config["trainer"]["strategy"]
    for name, about in config["techniques"].items():
        reason = about.get("unsupported", {}).get(strategy)
        if reason:
            raise UsageError(f"trainer.strategy: '{name}' cannot train under {strategy}: {reason}")


def _ordered(nodes: Config, where: str) -> dict[str, Any]:
    return {name: component(node, f"{where}.{name}") for name, node in nodes.items()}


def seed_of(config: Config, source: str) -> int:
    """The seed of one source of randomness: `seeds.<source>` where it is given, else the run's."""
    return config.get("seeds", {}).get(source, config["seed"])


def _check_seeds(config: Config) -> None:
    for source in config.get("seeds", {}):
        if source not in SOURCES:
            raise UsageError(f"seeds: no source of randomness '{source}'{nearest(source, SOURCES)}")
    for seed in (config["seed"], *(seed_of(config, source) for source in SOURCES)):
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed: must be between 0 and 4294967295, got {seed}")


def _check_trainer(trainer: Config) -> None:
    whole = ("max_steps", "batch_size", "accumulate", "processes", "log_every", "eval_every")
    for key in (*whole, "checkpoint_every", "keep_checkpoints"):
        nothing = key == "max_steps" and trainer["start_from"] and trainer[key] == 0
        if trainer[key] < 1 and not nothing:
            or_none = ", or 0 with trainer.start_from" if key == "max_steps" else ""
            raise UsageError(f"trainer.{key}: must be at least 1{or_none}, got {trainer[key]}")
    for key, kind in OPTIONAL.items():
        value = trainer[key]
        if value is not None and not (isinstance(value, kind) and value > 0):
            raise UsageError(f"trainer.{key}: must be a positive number or null, got {value!r}")
    if trainer["workers"] < 0:
        raise UsageError(f"trainer.workers: must be 0 or more, got {trainer['workers']}")
    choices = {
        "precision": tuple(PRECISIONS),
        "device": ("auto", "cpu", "cuda"),
        "strategy": STRATEGIES,
    }
    for key, valid in choices.items():
        if trainer[key] not in valid:
            raise UsageError(f"trainer.{key}: one of {', '.join(valid)}, got '{trainer[key]}'")
