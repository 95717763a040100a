"""Any model of timm."""

from pathlib import Path
from typing import Any

import models.torchvision_ops  # noqa: F401

# isort: split
import timm
import torch
from torch import Tensor, nn

from models.layers import Factory
from models.outputs import Outputs
from models.swap import swap_activations, swap_norms
from training.errors import nearest


class Timm(nn.Module):
    """An image classifier that timm builds.

    Args:
        in_channels, image_size, num_classes: of the task; the size goes to models built for one.
        name: of the model, as `timm.list_models()` has it.
        width, depth, heads: passed as `embed_dim`, `depth`, `num_heads` to models that take them;
            default: the named model's own.
        pretrained: load timm's weights, from its cache or the network.
        checkpoint: file with weights to load.
        keys: further arguments of `timm.create_model`, e.g. `{patch_size: 4}`.
        activation, norm: replace the model's, see `models.swap`; default: its own.

    Returns `logits` (batch, num_classes).

    Raises:
        ValueError: for a name timm does not know, a checkpoint that is not there or does not fit,
            arguments the model refuses, or nothing to replace.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        *,
        name: str,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        keys: dict[str, Any] | None = None,
        activation: Factory | None = None,
        norm: Factory | None = None,
    ) -> None:
        super().__init__()
        architecture = name.split(".")[0]
        if not timm.is_model(architecture):
            raise ValueError(
                f"model.name: timm has no '{name}'{nearest(architecture, timm.list_models())}"
            )
        if checkpoint is not None and not Path(checkpoint).is_file():
            siblings = [str(p) for p in Path(checkpoint).parent.glob("*") if p.is_file()]
            raise ValueError(
                f"model.checkpoint: no file '{checkpoint}'{nearest(checkpoint, siblings)}"
            )
        sizes = {"embed_dim": width, "depth": depth, "num_heads": heads}
        arguments = {key: value for key, value in sizes.items() if value is not None}
        arguments |= {"in_chans": in_channels, "num_classes": num_classes, **(keys or {})}
        self.model = create(name, pretrained, checkpoint, image_size, arguments)
        self.shape = (in_channels, image_size, image_size)
        self._try()
        if activation is not None:
            swap_activations(self.model, activation, self._try)
        if norm is not None:
            swap_norms(self.model, norm)
            self._try()

    def forward(self, pixel_values: Tensor) -> Outputs:
        return Outputs(logits=self.model(pixel_values))

    def _try(self) -> None:
        """One evaluation forward pass, so that what does not fit shows before training."""
        self.model.eval()
        try:
            with torch.no_grad():
                self.model(torch.zeros(1, *self.shape))
        except (RuntimeError, AssertionError, IndexError) as error:
            raise ValueError(
                f"model.name: it does not work on images of shape {self.shape}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        self.model.train()


def create(
    name: str,
    pretrained: bool,
    checkpoint: str | None,
    image_size: int,
    arguments: dict[str, Any],
) -> nn.Module:
    """`timm.create_model`, with `img_size` where the model takes it.

    Raises:
        ValueError: when timm refuses the arguments or the checkpoint.
    """
    keys = {"pretrained": pretrained, "checkpoint_path": checkpoint or "", **arguments}
    try:
        try:
            return timm.create_model(name, **{"img_size": image_size, **keys})
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(name, **keys)
    except Exception as error:  # timm's models raise whatever their authors chose
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model.name: timm could not build '{name}': {reason}") from error
