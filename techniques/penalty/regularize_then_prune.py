"""A norm of the weights that are to be removed."""

from typing import Any

import torch
from torch import Tensor, nn

from techniques.post.hidden import hidden_units


class RegularizeThenPrune:
    """Σ over weight matrices of ‖their part that will be removed‖: rows of the layers into marked
    hidden units and columns of the layer out of them, which training on a little data brings
    towards zero while the loss moves what they did into the units that stay. 0 where none is
    marked.

    Args:
        norm: 1 for Σ|w|, 2 for √Σw² of each matrix's part.

    Raises:
        ValueError: for another norm.

    Source: "DReSS: Data-driven Regularized Structured Streamlining for Large Language Models",
    arXiv 2501.17905: its abstract (regularise the components to be removed with a small amount of
    data, then remove them, then fine-tune) and summaries of it, which name selected channels of the
    weight matrices and an L1 or L2 norm. The authors' code could not be found, and neither which of
    the two norms they use, nor whether squared, nor its coefficient could be confirmed.
    """

    def __init__(self, norm: int = 1) -> None:
        if norm not in (1, 2):
            raise ValueError(f"norm: 1 or 2, got {norm}")
        self.norm = norm

    def __call__(self, model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
        parts = []
        for hidden in hidden_units(model).values():
            removed = hidden.out._buffers.get("removed")
            if removed is not None:
                parts += [layer.weight[removed] for layer in hidden.into]
                parts.append(hidden.out.weight[:, removed])
        if not parts:
            return batch["labels"].new_zeros((), dtype=torch.float32)
        return torch.stack([torch.linalg.vector_norm(part, self.norm) for part in parts]).sum()
