"""What a model returns."""

from typing import Any

from torch import Tensor


class Outputs(dict[str, Any]):
    """A model's outputs by name: a dict whose `logits` are computed on first use.

    A model with a classifier over its last hidden states returns `hidden` (..., dim) and
    `classifier` (the module that maps them to logits). Fused losses read those two; everything else
    reads `logits`, and pays for them only then.
    """

    def __missing__(self, key: str) -> Tensor:
        if key != "logits" or "hidden" not in self:
            raise KeyError(key)
        self["logits"] = self["classifier"](self["hidden"])
        return self["logits"]
