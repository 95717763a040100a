"""A run's model for other programs."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

from techniques.reparam import adapters
from training import checkpoint
from training.configs import Config
from training.errors import EnvironmentFault, UsageError
from training.trained import trained


def write(
    run: Path, config: Config, to: Path, form: str, which: str, merge: bool = False
) -> dict[str, Any]:
    """Write the model of a checkpoint into the folder `to`; returns `path`, `step`, `format`.

    Args:
        run: the run's folder.
        config: its configuration.
        to: folder that receives `model.safetensors` and `config.json`.
        form: `"safetensors"` (weights as they train, and the run's configuration), `"adapter"`
            (`adapter.safetensors` in place of the model's: adapters and what is trained with them)
            or `"huggingface"` (what `transformers` loads with `from_pretrained`).
        which: `"best"` or `"last"`.
        merge: compute what parametrizations (adapters, quantisation) make of the weights first, so
            that the model loads without them.

    Raises:
        UsageError: without a checkpoint, for a model Hugging Face has no class for, or for adapters
            of a model that has none.
        EnvironmentFault: when the folder cannot be written.
    """
    parts, step = trained(run, config, which)
    model = parts.model
    if merge:
        merge_parametrizations(model)
    elif form == "huggingface" and any(parametrize.is_parametrized(m) for m in model.modules()):
        raise UsageError("--format huggingface: it has parametrized weights; merge them (--merge)")
    try:
        to.mkdir(parents=True, exist_ok=True)
        if form == "huggingface":
            _save_pretrained(model, config, to)
        else:
            if form == "adapter":
                save_file(_adapters(model), to / adapters.FILE)
            else:
                checkpoint.save_weights(model, to / "model.safetensors")
            (to / "config.json").write_text(json.dumps(config, indent=2))
    except OSError as error:
        raise EnvironmentFault(f"cannot write {to}: {error.strerror}") from error
    return {"path": str(to), "step": step, "format": form}


def merge_parametrizations(model: nn.Module) -> None:
    """Put in place of every parametrized tensor the value it has."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    try:
        return {name: value.contiguous() for name, value in adapters.state(model).items()}
    except ValueError as error:
        raise UsageError(f"--format: {error}; use --format safetensors") from error


def _save_pretrained(model: nn.Module, config: Config, to: Path) -> None:
    if not hasattr(model, "save_pretrained"):
        raise UsageError(
            f"--format: model '{config['choices']['model']}' has no Hugging Face class; "
            "use --format safetensors"
        )
    model.save_pretrained(to)  # type: ignore[operator]
