"""Inf-CL: InfoNCE without its matrix of similarities."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.contrastive_loss import contrastive_loss
from tasks.pairs import embeddings


class InfCL(nn.Module):
    """InfoNCE in memory linear in the batch: similarities are made tile by tile, and again in the
    backward. Values and gradients are those of the task's `infonce`, except that in several
    processes the negatives are those of all of them, which travel around a ring.

    Minimiser: partners alike and all others as far from them as there is room. Range: from
    log(1 + n·exp(−2/temperature)), of a cosine of 1 among n of −1, to infinity with n. Cosines are
    bounded, so nothing is saturated by long embeddings.

    Args:
        temperature: cosines are divided by it; 0.5 as the task `pairs` has it, CLIP ends at 0.01.
        backend: `"auto"`, `"reference"`, `"tiled"` or `"triton"`.

    Shapes: `image_embeds` and `text_embeds` (batch, embedding) to losses (batch,), or `logits`
    (2·batch, embedding) of two views to (2·batch,).

    Raises:
        ValueError: for a temperature that is not positive.

    Source: "Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss",
    arXiv 2410.17243; its code, https://github.com/DAMO-NLP-SG/Inf-CLIP, could not be read here.
    """

    def __init__(self, temperature: float = 0.5, backend: str = "auto") -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.temperature, self.backend = temperature, backend

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        return contrastive_loss(
            *embeddings(outputs),
            kind="infonce",
            scale=1 / self.temperature,
            group=processes(self.training),
            backend=self.backend,
        )


def processes(training: bool) -> dist.ProcessGroup | None:
    """Those that train together. In evaluation each has its own batches, not always of one size."""
    if not (training and torch.is_grad_enabled() and dist.is_available()):
        return None
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
