"""What a model makes of images, for the probes of it."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from tasks.fetch import fetch
from techniques.callback import probing
from training.data import move
from training.errors import UsageError
from training.evaluate import spread
from training.parallel import reshard

if TYPE_CHECKING:
    from training.run import Run


@dataclass
class Representations:
    """Of each sample, float64 on the CPU: `features` (samples, width) before the head or the
    projection, `embeddings` (samples, dim) behind it, and `labels` (samples,), None without."""

    features: Tensor
    embeddings: Tensor
    labels: Tensor | None


def represent(
    run: "Run", dataset: Dataset, samples: int | None, size: int = 256
) -> Representations:
    """Representations of up to so many evenly spaced samples, without augmentation, in evaluation
    mode, `size` at a time. No random state and no state of a layer changes.

    Raises:
        UsageError: for a model that does not give one vector of features a sample.
    """
    task = run.task
    indices = spread(len(dataset), samples)
    parts: list[tuple[Tensor, Tensor]] = []
    labels: list[Tensor] = []
    try:
        with probing.looking(run):
            for some in indices.split(math.ceil(len(indices) / math.ceil(len(indices) / size))):
                generator, rows = torch.Generator().manual_seed(0), fetch(dataset, some)
                if hasattr(task, "plain"):
                    batch = task.plain(rows, generator)
                else:
                    batch = task.prepare(rows, generator, False)
                parts.append(_vectors(run.objective.predict(move(batch, run.device))))
                if "labels" in batch:
                    labels.append(batch["labels"])
    finally:
        reshard(run.model)
    features, embeddings = (torch.cat([part[n] for part in parts]) for n in (0, 1))
    return Representations(features, embeddings, torch.cat(labels) if labels else None)


def _vectors(outputs: Any) -> tuple[Tensor, Tensor]:
    """Features and embeddings of a batch."""
    names = ("image_hidden", "image_embeds") if "image_hidden" in outputs else ("hidden", "logits")
    if names[0] not in outputs or outputs[names[0]].ndim != 2:
        raise UsageError("callbacks: the model does not give one vector of features a sample")
    features, embeddings = (outputs[name].double().cpu() for name in names)
    return features, embeddings
