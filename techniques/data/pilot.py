"""The model that a selection of training samples asks."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tasks.cache import model_digest
from tasks.losses import precise, valid
from training.components import call, offered
from training.objective import Batch, predict
from training.trained import model_of

FEATURES = ("image_hidden", "latent", "hidden", "logits")


def pilot(
    of: str | None,
    model: Callable[..., nn.Module] | None,
    task: Any,
    accelerator: Accelerator,
    trust: bool = False,
) -> tuple[nn.Module, list[str]]:
    """A model on the device, in evaluation mode and without gradients, and its part of a cache's
    key.

    Args:
        of: a run's folder, whose newest weights it has; or
        model: a component that makes a model, as in `conf/model/`, told the task's dimensions.
            Without trained weights they are drawn from a fixed seed.
        task, accelerator: the run's.
        trust: import what the folder's configuration names from whatever package.

    Raises:
        ValueError: without exactly one of `of` and `model`.
        UsageError: for a folder without a checkpoint, or a model that cannot be made.
    """
    if (of is None) == (model is None):
        raise ValueError("of, model: exactly one of them, a run's folder or a model component")
    if of is not None:
        made, about = model_of(of, accelerator, "data.transforms: of", trust)
    else:
        assert model is not None
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            made = call(model, "data.transforms: model", **offered(model, task.dims))
        made, about = made.to(accelerator.device).eval().requires_grad_(False), repr(made)
    return made, [about, model_digest(made)]


def embeddings(model: nn.Module) -> Callable[[Batch], Tensor]:
    """For `selection.over`: a vector of features for each sample, those before the head or the
    projection, of tokens the mean over those whose label counts."""

    def features(batch: Batch) -> Tensor:
        outputs = predict(model, batch)
        found = precise(outputs[next(name for name in FEATURES if name in outputs)])
        if found.ndim == 2:
            return found
        mask = valid(found[..., 0], batch).unsqueeze(-1)
        return (found * mask).flatten(1, -2).sum(1) / mask.flatten(1, -2).sum(1).clamp(min=1)

    return features
