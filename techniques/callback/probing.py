"""What callbacks look at a model with, leaving no trace in the run."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tasks.fetch import fetch
from training.data import move
from training.errors import UsageError
from training.evaluate import spread

if TYPE_CHECKING:
    from training.run import Run


@contextlib.contextmanager
def looking(run: "Run") -> Iterator[None]:
    """Within it the model is in evaluation mode, and neither the random state nor any layer's state
    changes. It runs uncompiled: what a hook does would otherwise be compiled anew each time."""
    devices = [run.device] if run.device.type == "cuda" else []
    training = run.model.training
    run.model.eval()
    try:
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            run.accelerator.autocast(),
        ):
            yield
    finally:
        run.model.train(training)


@contextlib.contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Within it, layers whose gradients are random or biased have the exact ones: those with an
    attribute `exact`, which is true meanwhile."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "exact", None), bool)]
    before = [m.exact for m in layers]
    for layer in layers:
        layer.exact = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, value in zip(layers, before):
            layer.exact = value


def forward(run: "Run") -> None:
    """Run the model on the last micro-batch, `looking`; hooks on its layers see it."""
    with looking(run):
        outputs(run, run.batch)


def watch(
    run: "Run",
    layers: Iterable[nn.Module],
    look: Callable[[int, tuple[Any, ...], Any], None],
) -> None:
    """`forward`, with `look(number, inputs, output)` called for each of the layers in it."""
    handles = [
        layer.register_forward_hook(lambda _, inputs, output, n=number: look(n, inputs, output))
        for number, layer in enumerate(layers)
    ]
    try:
        forward(run)
    finally:
        for handle in handles:
            handle.remove()


def validation(
    run: "Run", dataset: Any = None, size: int = 256, samples: int | None = None
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Batches of the whole validation set, or of another dataset in its place, or of up to so many
    evenly spaced samples of it, each with the model's outputs, `looking`."""
    dataset = run.task.validation if dataset is None else dataset
    for part in spread(len(dataset), samples).split(size):
        rows = fetch(dataset, part)
        generator = torch.Generator().manual_seed(0)
        batch = move(run.task.prepare(rows, generator, False), run.device)
        with looking(run):
            found = outputs(run, batch)
        yield batch, found


def outputs(run: "Run", batch: dict[str, Any]) -> Any:
    """What the model makes of a batch, its classifier run too."""
    found = run.objective.predict(batch)
    if "hidden" in found:
        found["logits"]  # made on first use: the classifier runs now
    return found


def refuse_shards(run: "Run", what: str) -> None:
    """Refuse a probe that needs whole parameters, under FSDP2.

    Raises:
        UsageError: naming the probe.
    """
    if run.accelerator.num_processes > 1 and run.config["trainer"]["strategy"] == "fsdp2":
        raise UsageError(f"callbacks: {what} needs trainer.strategy=ddp")


def training_batch(run: "Run", samples: int) -> dict[str, Any]:
    """Up to so many evenly spaced training samples as one batch, without augmentation."""
    rows = fetch(run.task.train, spread(len(run.task.train), samples))
    # A generator of its own, so that the run's random numbers stay as they are.
    return move(run.task.prepare(rows, torch.Generator().manual_seed(0), False), run.device)
