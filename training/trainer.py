"""The training loop."""

import contextlib
import inspect
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from training import checkpoint, packing
from training.data import labelled, move
from training.errors import UsageError
from training.evaluate import evaluate
from training.interrupts import Interrupts
from training.objective import Losses
from training.parallel import local, whole
from training.progress import Progress
from training.run import Run

COMPLETED, STOPPED, DIVERGED = "completed", "stopped", "diverged"


def fit(run: Run, tracker: Any, progress: Progress) -> str:
    """Train from `run.step` to the end and return the status; the reason is in `run.stopped`.

    `completed`: all steps are taken, or a budget or a callback ended the run. `stopped`: it was
    interrupted, and a checkpoint is written. `diverged`: a loss or a parameter is not finite; the
    checkpoints before that are kept.
    """
    trainer = run.config["trainer"]
    take_step = Step(run)
    loader = run.batches.loader(
        run.step, run.max_steps, trainer["workers"], run.device.type == "cuda"
    )
    clock = time.monotonic() - run.seconds
    run.objective.train()
    with _mistakes():
        _notify(run, "on_fit_start")
    progress.start(run)
    first = run.step
    with Interrupts() as interrupts:
        for microbatches in loader:
            with _mistakes() if run.step == first else contextlib.nullcontext():
                take_step(microbatches)
            _notify(run, "on_step_end")
            progress.advance(run)
            run.seconds = time.monotonic() - clock
            due = {key: run.step % trainer[f"{key}_every"] == 0 for key in ("log", "eval")}
            _check_limits(run, interrupts, due["log"])
            last = run.stopped is not None or run.step == run.max_steps

            values: dict[str, float] = {}
            if due["log"] or (last and not interrupts):  # resumed, it logs as if it had gone on
                values |= _take_window(run)
            if _finite(values) and (due["eval"] or (last and not interrupts)):
                _notify(run, "on_eval_start")
                run.evaluation = run.step, evaluate(run)
                values |= run.evaluation[1]
                _notify(run, "on_eval_end")
                last = last or run.stopped is not None
            values |= run.recorded
            run.recorded = {}
            if values:
                _write(run, values, tracker, progress)
            if not _finite(values):
                run.stopped = f"the loss is not finite at step {run.step}"
                return DIVERGED

            if last or run.step % trainer["checkpoint_every"] == 0:
                if not _parameters_finite(run):
                    run.stopped = f"a parameter is not finite at step {run.step}"
                    return DIVERGED
                _save(run)
            if last:
                break
    if interrupts:
        return STOPPED
    if run.max_steps == 0 and not checkpoint.found(run.folder):
        _look(run, tracker, progress)
    _notify(run, "on_fit_end")
    _post(run, tracker, progress)
    return COMPLETED


class Step:
    """One optimizer step: gradient, clipping, update, schedule."""

    def __init__(self, run: Run) -> None:
        self.run, self.scaler = run, run.accelerator.scaler
        self.backward = Backward(self.scaler)
        self.parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        self.clip_norm = run.config["trainer"]["clip_norm"] or math.inf
        self.wants_loss = "loss" in inspect.signature(run.optimizer.step).parameters

    def __call__(self, microbatches: list[dict[str, Any]]) -> None:
        run = self.run
        microbatches = [move(batch, run.device) for batch in microbatches]
        run.microbatches, run.batch = microbatches, microbatches[-1]
        self._share(microbatches)
        run.count += sum(run.task.count(batch) for batch in microbatches)
        _notify(run, "on_batch")
        losses: Losses = run.gradient(run.wrapped, run.model, microbatches, self.backward)
        run.losses = losses
        if self.scaler is not None:
            self.scaler.unscale_(run.optimizer)
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm))
        _notify(run, "on_gradients")
        keys: dict[str, Any] = {}
        if self.wants_loss:  # the whole batch's, so that all processes take the same step
            keys["loss"] = run.accelerator.reduce(losses.total, "mean")
        if self.scaler is None:
            run.optimizer.step(**keys)
        else:
            self.scaler.step(run.optimizer, **keys)
            self.scaler.update()
        run.schedule.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        self._add_to_window(losses, grad_norm)

    def _share(self, microbatches: list[dict[str, Any]]) -> None:
        """Make each `share` one of the labels of all processes."""
        world = self.run.accelerator.num_processes
        if world == 1:
            return
        own = torch.tensor(float(sum(labelled(b) for b in microbatches)), device=self.run.device)
        total = self.run.accelerator.reduce(own.clone(), "sum")
        for batch in microbatches:
            # Gradients are averaged over processes; times their number, the average is the sum.
            batch["share"] = batch["share"] * own / total * world

    def _add_to_window(self, losses: Losses, grad_norm: Tensor) -> None:
        values = dict(losses.parts)
        if len(values) > 1:
            values["total"] = losses.total
        values["grad_norm"] = grad_norm
        values["steps"] = torch.ones_like(grad_norm)
        window = self.run.window
        for name, value in values.items():
            window[name] = window[name] + value if name in window else value


class Backward:
    """`backward(loss)`: backpropagates, scaled under fp16 by `scale`, else 1."""

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler

    def __call__(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    @property
    def scale(self) -> float:
        """The factor in every gradient until the optimizer's step."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()


def _check_limits(run: Run, interrupts: Interrupts, meeting: bool) -> None:
    """Ask the run to stop when it was interrupted or its time is up."""
    minutes = run.config["trainer"]["max_minutes"]
    late = minutes is not None and run.seconds > 60 * minutes
    reasons = [interrupts.reason, f"{minutes} minutes are over" if late else None]
    if run.accelerator.num_processes > 1:
        if not meeting:  # processes must stop at the same step, so they ask where they meet anyway
            return
        reasons = gather_object(reasons)
        interrupts.reason = next((r for r in reasons[0::2] if r), None)
    for reason in reasons:
        if reason:
            run.stop(reason)


def _take_window(run: Run) -> dict[str, float]:
    """Means over the steps since the last line, and the learning rate."""
    window, run.window = run.window, {}
    if run.accelerator.num_processes > 1:
        window = run.accelerator.reduce(window, "mean")
    assert isinstance(window, dict)
    steps = window.pop("steps")
    means = {
        name if name == "grad_norm" else f"train/{name}": float(value / steps)
        for name, value in window.items()
    }
    return means | {"lr": run.optimizer.param_groups[0]["lr"]}


def _finite(values: dict[str, float]) -> bool:
    # Not the gradient norm: under fp16 an infinite one is skipped and the loss scale halved.
    return all(math.isfinite(v) for k, v in values.items() if k.endswith(("/loss", "/total")))


def _parameters_finite(run: Run) -> bool:
    finite = all(bool(torch.isfinite(local(p)).all()) for p in run.model.parameters())
    return all(gather_object([finite])) if run.accelerator.num_processes > 1 else finite


def _write(run: Run, values: dict[str, float], tracker: Any, progress: Progress) -> None:
    timing = progress.timing(run)
    run.metrics.write({"step": run.step, **values}, {"step": run.step, **timing})
    run.last |= values
    tracker.log(values | timing, run.step)
    progress.line(run, values, timing)


def _save(run: Run) -> None:
    """Write a checkpoint, remember whether it is the best, and remove old ones."""
    monitor, (step, metrics) = run.config["trainer"]["monitor"], run.evaluation
    better = False
    if step == run.step and monitor in metrics:
        better = run.best is None or metrics[monitor] < run.best
        run.best = metrics[monitor] if better else run.best
    run.metrics.sync()
    path = checkpoint.save(run)
    if run.main:
        if better:
            checkpoint.mark_best(run, path)
        checkpoint.prune(run.folder, run.config["trainer"]["keep_checkpoints"])
    run.accelerator.wait_for_everyone()


def _look(run: Run, tracker: Any, progress: Progress) -> None:
    """Evaluate and keep what a run without steps starts from."""
    _notify(run, "on_eval_start")
    run.evaluation = 0, evaluate(run)
    _notify(run, "on_eval_end")
    _write(run, run.evaluation[1] | run.recorded, tracker, progress)
    run.recorded = {}
    _save(run)


def _post(run: Run, tracker: Any, progress: Progress) -> None:
    """Apply the steps after training; evaluate, keep and weigh the model after each."""
    if not run.post:
        return
    values = {"post/bytes": float(len(packing.pack(run.model, run.grids)))}
    for name, step in run.post.items():
        step(run)
        values |= {f"post/{name}/{key}": value for key, value in evaluate(run).items()}
        folder = run.folder / "post"
        checkpoint.save_weights(run.model, folder / f"{name}.safetensors", run.main)
        packed = folder / f"{name}.packed.safetensors"
        size = checkpoint.save_packed(run.model, run.grids, packed, run.main)
        values[f"post/{name}/bytes"] = float(size)
        _write(run, values | run.recorded, tracker, progress)
        values, run.recorded = {}, {}


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    """What a part refuses before it has done a step is a mistake in how parts were put together."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error


def _notify(run: Run, event: str) -> None:
    for part in (*run.transforms.values(), *run.callbacks.values()):
        if hasattr(part, event):
            getattr(part, event)(run)
