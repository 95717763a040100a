"""SigLIP: the sigmoid contrastive loss."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kernels.contrastive_loss import contrastive_loss
from tasks.pairs import embeddings
from techniques.loss.inf_cl_tiled_contrastive import processes


class SigLIP(nn.Module):
    """Every pair of the batch is classified as matching or not, by a sigmoid of its cosine.

    The loss of sample i is Σⱼ −log σ(zᵢⱼ·(t·xᵢ·yⱼ + b)) with zᵢⱼ = 1 for partners and −1 else;
    t = exp(t′) and b are learned. Its memory is linear in the batch. In several processes the
    negatives are those of all of them.

    Minimiser: partners of cosine 1, all others of −1. Range: [0, ∞). Cosines are bounded, so long
    embeddings saturate nothing; where t·cosine + b is large and wrong the slope is ±t.

    Of two views of an image, every view is contrasted with all others, as in SimCLR; the paper has
    images and captions alone.

    Args:
        temperature: where t starts; 10.
        bias: where b starts; −10, so that the many negatives do not drive the first steps.
        backend: `"auto"`, `"reference"`, `"tiled"` or `"triton"`.

    Shapes: `image_embeds` and `text_embeds` (batch, embedding) to losses (batch,), or `logits`
    (2·batch, embedding) of two views to (2·batch,).

    Raises:
        ValueError: for a temperature that is not positive.

    Source: "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343;
    https://github.com/mlfoundations/open_clip, `src/open_clip/loss.py` (`SigLipLoss`), and
    https://github.com/google-research/big_vision.
    """

    def __init__(
        self, temperature: float = 10.0, bias: float = -10.0, backend: str = "auto"
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))
        self.bias = nn.Parameter(torch.tensor([float(bias)]))
        self.backend = backend

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        return contrastive_loss(
            *embeddings(outputs),
            kind="sigmoid",
            scale=self.log_temperature.exp().squeeze(),
            bias=self.bias.squeeze(),
            group=processes(self.training),
            backend=self.backend,
        )
