"""What a loss is where a model's weights are moved to, and what is kept of it in a run's folder."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from study import plots
from tasks.losses import masked_mean
from techniques.callback import probing
from training.files import write_atomically
from training.parallel import local, reshard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.run import Run

FOLDER = "probes"
"""Of what is kept, in the run's."""


@contextlib.contextmanager
def movable(run: "Run") -> Iterator[dict[str, Tensor]]:
    """This process's parts of the trained parameters, by name; in the end they and the layers'
    buffers are what they were, to the bit. It keeps a copy of them all."""
    parameters = {n: local(p.detach()) for n, p in run.model.named_parameters() if p.requires_grad}
    state = [*parameters.values(), *run.model.buffers()]
    before = [tensor.clone() for tensor in state]
    try:
        yield parameters
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, before):
                tensor.copy_(value)


def loss_of(run: "Run", batch: dict[str, Any]) -> float:
    """The task's mean loss of a batch, without penalties, in evaluation mode: one forward."""
    with probing.looking(run):
        outputs = run.objective.predict(batch)
        found = float(masked_mean(run.task.loss(outputs, batch), outputs, batch))
    reshard(run.model)  # what stays gathered would not follow the parts
    return found


def keep(run: "Run", name: str, drawn: "Figure", **arrays: Any) -> None:
    """Write `probes/<name>.npz` and `probes/<name>.png`, each whole or not at all."""
    if not run.main:
        return
    folder = run.folder / FOLDER
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(folder / f"{name}.npz", buffer.getvalue())
    plots.save(drawn, folder / f"{name}.png")


def kept(folder: Path, name: str) -> dict[str, np.ndarray] | None:
    """The arrays of `probes/<name>.npz`, `None` without it."""
    path = folder / FOLDER / f"{name}.npz"
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        return dict(arrays)
