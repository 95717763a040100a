"""Weights that training has reparametrised, as plain ones."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from techniques.fake_quant import LEAST_STEP, LearnedStep
from training.errors import UsageError
from training.export import merge_parametrizations
from training.packing import Affine

if TYPE_CHECKING:
    from training.run import Run


class Merged:
    """Puts in place of every parametrized tensor the value it has: of quantisation-aware training,
    an adapter. What a `LearnedStep` has quantised by row is kept on its grid.

    Raises:
        UsageError: when it is applied to a model without any, or to one shared by FSDP2.
    """

    def __call__(self, run: "Run") -> None:
        """Merge them."""
        if any(isinstance(p, DTensor) for p in run.model.parameters()):
            raise UsageError("trainer.strategy: fsdp2 cannot merge parametrized tensors")
        if not any(parametrize.is_parametrized(m) for m in run.model.modules()):
            raise UsageError("post: the model has no parametrized tensor")
        found = dict(_stepped(run.model))
        merge_parametrizations(run.model)
        with torch.no_grad():
            for name, (grid, integers) in found.items():
                weight = run.model.get_parameter(name)
                weight.copy_((grid.scale * integers).view_as(weight))
                run.grids[name] = grid


def _stepped(model: nn.Module) -> Iterator[tuple[str, tuple[Affine, Tensor]]]:
    """Weights quantised with learned steps: their grids, and signed integers by row."""
    for prefix, module in model.named_modules():
        for name, chain in getattr(module, "parametrizations", {}).items():
            last = chain[-1]
            step = getattr(last, "quantise", last)
            if isinstance(step, LearnedStep) and getattr(last, "quantised", True):
                integers = step.integers(chain.original).flatten(1)
                scale = step.step.detach().clamp(min=LEAST_STEP)[:, None]
                bits = (step.high - step.low).bit_length()
                yield f"{prefix}.{name}", (Affine(scale, -step.low, bits), integers)
