"""Evaluation on the validation set."""

import math
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from tasks.fetch import fetch
from tasks.losses import valid
from training.data import mix, move
from training.errors import UsageError, nearest
from training.parallel import reshard
from training.run import Run


def evaluate(run: Run, samples: int | None = None) -> dict[str, float]:
    """`val/loss` and the task's scores: exact means over `samples` or `trainer.eval_samples`.

    What the task collects of each batch reaches its `summarise` whole, in the samples' order. Every
    evaluation of a run sees the same samples and the same random numbers, and leaves the run's own
    random state as it was.
    """
    trainer = run.config["trainer"]
    parts = trainer["accumulate"] * run.accelerator.num_processes
    size = trainer["eval_batch_size"] or math.ceil(trainer["batch_size"] / parts)
    batches = spread(len(run.task.validation), samples or trainer["eval_samples"]).split(size)
    sums: dict[str, list[float]] = {}
    collected: dict[int, dict[str, Tensor]] = {}
    was_training = run.model.training
    run.objective.eval()
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), run.accelerator.autocast():
        world, rank = run.accelerator.num_processes, run.accelerator.process_index
        for turn in range(math.ceil(len(batches) / world)):
            # A process with nothing left joins in what the others' models do together.
            number = min(turn * world + rank, len(batches) - 1)
            torch.manual_seed(mix(0, number))
            generator = torch.Generator().manual_seed(mix(1, number))
            rows = fetch(run.task.validation, batches[number])
            batch = move(run.task.prepare(rows, generator, False), run.device)
            outputs = run.objective.predict(batch)
            scores = {"loss": run.eval_loss(outputs, batch), **run.task.scores(outputs, batch)}
            if turn * world + rank == number:
                for name, values in scores.items():
                    _add(sums.setdefault(name, [0.0, 0.0]), values, batch)
                if hasattr(run.task, "collect"):
                    rows = run.task.collect(outputs, batch)
                    collected[number] = {name: value.cpu() for name, value in rows.items()}
    reshard(run.model)
    run.objective.train(was_training)
    means = _means(gather_object([sums]) if world > 1 else [sums])
    if hasattr(run.task, "derived"):
        means |= run.task.derived(means)
    if hasattr(run.task, "collect"):
        shards = gather_object([collected]) if world > 1 else [collected]
        means |= run.task.summarise(_joined(shards))
    return {f"val/{name}": value for name, value in means.items()}


def check_monitor(run: Run) -> None:
    """Find a misspelt `trainer.monitor` before training, by evaluating one sample.

    Raises:
        UsageError: naming the nearest metric, when the task has none of that name.
    """
    monitor = run.config["trainer"]["monitor"]
    if monitor == "val/loss":
        return
    known = evaluate(run, samples=1)
    if monitor not in known:
        raise UsageError(f"trainer.monitor: no metric '{monitor}'{nearest(monitor, known)}")


def _add(total: list[float], values: Tensor, batch: dict[str, Any]) -> None:
    mask = valid(values, batch)
    total[0] += float((values * mask).sum(dtype=torch.float64))
    total[1] += float(mask.sum())


def _means(shards: list[dict[str, list[float]]]) -> dict[str, float]:
    names = [name for shard in shards for name in shard]
    means = {}
    for name in dict.fromkeys(names):
        total = sum(shard[name][0] for shard in shards if name in shard)
        count = sum(shard[name][1] for shard in shards if name in shard)
        means[name] = total / max(count, 1)
    return means


def _joined(shards: list[dict[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The rows of every batch, whichever process had it, in the batches' order."""
    batches = {number: rows for shard in shards for number, rows in shard.items()}
    parts = [batches[number] for number in sorted(batches)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def spread(length: int, wanted: int | None) -> Tensor:
    """Indices of up to `wanted` samples, evenly spaced over the whole set."""
    if wanted is None or wanted >= length:
        return torch.arange(length)
    return torch.arange(wanted) * length // wanted
