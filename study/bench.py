"""What assay's loop costs: the same model trained by it, by a bare loop and by its peers.

Every trainer gets the same model, data, optimizer and clipping. They take turns in
one process, a block of steps at a time, and a block is timed between its first and its last step,
so start-up, evaluation and checkpoints are left out for all.
"""

import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.fetch import fetch
from training.assemble import assemble, build_model, build_task
from training.compose import compose
from training.configs import Config
from training.progress import Progress
from training.trainer import fit

SMALL = (
    *("model.width=32", "model.depth=1", "model.heads=2", "trainer.batch_size=4"),
    "task.context_length=32",
)
"""A GPT so small that the loops show: of the default one, over 99% of a step is the model's."""

Block = Callable[[int], float]
"""Trains so many steps and returns the seconds one of them took."""


def measure(trainers: dict[str, Block], steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each trainer, in each round; a first round warms up and is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(rounds + 1):
        # The order turns round by round, so that none always follows the same one.
        names = list(trainers)[:: 1 if number % 2 else -1]
        for name in names:
            taken = trainers[name](steps)
            if number:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: list[float], base: list[float]) -> float:
    """Median over the rounds of one trainer's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, base))


def loop(overrides: list[str], steps: int, rounds: int) -> dict[str, Any]:
    """assay's trainer beside a bare PyTorch loop; `ratio` is assay's time over the loop's."""
    config = _config(overrides)
    seconds = measure({"assay": assay(config), "bare": bare(config)}, steps, rounds)
    return _result(seconds, steps, rounds) | {"ratio": ratio(seconds["assay"], seconds["bare"])}


def peers(overrides: list[str], steps: int, rounds: int) -> dict[str, Any]:
    """assay beside `transformers.Trainer` and Lightning; ratios are a peer's time over ours.

    The model is `SMALL` unless overridden: at larger ones the matrix products, which all three
    share, hide the loops.
    """
    config = _config([*SMALL, *overrides])
    trainers = {
        "assay": assay(config),
        "transformers": transformers_trainer(config),
        "lightning": lightning(config),
    }
    seconds = measure(trainers, steps, rounds)
    ratios = {n: ratio(seconds[n], seconds["assay"]) for n in trainers if n != "assay"}
    return _result(seconds, steps, rounds) | {"ratios": ratios}


def assay(config: Config) -> Block:
    """assay's own trainer, logging and all; only W&B is off, as the others have none."""

    def block(steps: int) -> float:
        clock = Clock()
        run = assemble(_with_steps(config, steps))
        run.callbacks["clock"] = clock
        with tempfile.TemporaryDirectory() as folder:
            run.open(Path(folder))
            fit(run, _Silent(), Progress())
            run.metrics.close()
        return clock.seconds()

    return block


def bare(config: Config) -> Block:
    """Twenty lines of PyTorch."""
    task = build_task(config["task"])
    size, clip = config["trainer"]["batch_size"], config["trainer"]["clip_norm"]
    batches = _in_memory(task, size)

    def block(steps: int) -> float:
        clock = Clock()
        model = build_model(config, task.dims)
        optimizer = _adamw(config, model)
        total = 0.0
        for step in range(steps):
            batch = batches[step % len(batches)]
            loss = _loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
            clock.on_step_end(None)
        return clock.seconds()

    return block


def transformers_trainer(config: Config) -> Block:
    """`transformers.Trainer`, with everything off that it would write."""
    import models.torchvision_ops  # noqa: F401, I001 (must come first)
    import transformers

    task = build_task(config["task"])
    rows = _rows(task, config["trainer"]["batch_size"] * 32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model(config, task.dims)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": _loss(self.model, {"input_ids": input_ids, "labels": labels})}

    def block(steps: int) -> float:
        clock = Clock()

        class Timed(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.on_step_end(None)

        model = Model()
        with tempfile.TemporaryDirectory() as folder, _quiet():
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=config["trainer"]["batch_size"],
                max_grad_norm=config["trainer"]["clip_norm"],
                logging_steps=config["trainer"]["log_every"],
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            )
            trainer = transformers.Trainer(
                model=model,
                args=arguments,
                train_dataset=rows,  # type: ignore[arg-type]
                optimizers=(_adamw(config, model), None),
                callbacks=[Timed()],
            )
            trainer.train()
        return clock.seconds()

    return block


def lightning(config: Config) -> Block:
    """`lightning.Trainer`, with everything off that it would write."""
    import models.torchvision_ops  # noqa: F401, I001 (must come first)
    import lightning as L  # pyright: ignore[reportMissingImports] (an extra)

    task = build_task(config["task"])
    rows = _rows(task, config["trainer"]["batch_size"] * 32)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model(config, task.dims)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss = _loss(self.model, batch)
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _adamw(config, self)

    def block(steps: int) -> float:
        clock = Clock()

        class Timed(L.Callback):
            def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
                clock.on_step_end(None)

        with _quiet():
            loader = torch.utils.data.DataLoader(
                rows,  # type: ignore[arg-type]
                batch_size=config["trainer"]["batch_size"],
                shuffle=True,
            )
            trainer = L.Trainer(
                max_steps=steps,
                gradient_clip_val=config["trainer"]["clip_norm"],
                log_every_n_steps=config["trainer"]["log_every"],
                accelerator="auto",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[Timed()],
            )
            trainer.fit(Module(), loader)
        return clock.seconds()

    return block


class Clock:
    """A callback that notes when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, run: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """Mean seconds between the first step's end and the last's."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


class _Silent:
    def log(self, values: dict[str, Any], step: int) -> None:
        """Track nothing."""


def _config(overrides: list[str]) -> Config:
    return compose(["tracker=none", "schedule=constant", "schedule.warmup=0", *overrides])


def _with_steps(config: Config, steps: int) -> Config:
    trainer = config["trainer"] | {"max_steps": steps, "eval_samples": 1, "checkpoint_every": steps}
    return config | {"trainer": trainer | {"eval_every": steps}}


def _adamw(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    keys = {key: value for key, value in config["optimizer"].items() if key != "_target_"}
    return torch.optim.AdamW(model.parameters(), **keys)


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"])["logits"]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def _in_memory(task: Any, size: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(task.train), generator=generator)[: size * 32].split(size)
    return [task.prepare(fetch(task.train, part), generator, True) for part in order]


def _rows(task: Any, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(task.train), generator=generator)[:count]
    batch = task.prepare(fetch(task.train, order), generator, True)
    names = ("input_ids", "labels")
    return [{name: batch[name][i] for name in names} for i in range(count)]


def _result(seconds: dict[str, list[float]], steps: int, rounds: int) -> dict[str, Any]:
    per_second = {name: 1 / statistics.median(taken) for name, taken in seconds.items()}
    return {"steps_per_second": per_second, "steps": steps, "rounds": rounds}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the peers' notices from the terminal."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
