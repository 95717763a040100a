"""M-FLAG's orthogonality of the batch's latent features."""

from typing import Any

import torch
from torch import Tensor, nn

from tasks.losses import precise
from techniques.loss.inf_cl_tiled_contrastive import processes
from training.errors import UsageError
from training.parallel import gathered


class LatentOrthogonality:
    """½·[Σᵢ (Gᵢᵢ − 1)² + λ·Σᵢ≠ⱼ Gᵢⱼ²] with G = ZᵀZ/n, Z the (n, width) features of a batch's images
    before their projection: every feature of mean square 1, and orthogonal to the others over the
    batch of all processes. They are not centred.

    That is what the authors' code computes; its features' columns are divided by √n, not by their
    norms, which would leave the first sum without a gradient. The overlay's coefficient is theirs,
    1, beside an alignment of 4·(1 − cosine).

    At least 0, which is reached where G is the identity, and not for n below the width. It grows
    with the fourth power of the features, its gradient with the third; at features of zero the
    gradient is zero.

    Args:
        off_diagonal: λ; 0.0051.

    Shapes: `image_hidden` (n, width), or `hidden` (n, width) of a model without text, to a scalar.

    Raises:
        ValueError: for a λ below 0.
        UsageError: for a model without such features.

    Source: "M-FLAG: Medical Vision-Language Pre-training with Frozen Language Models and Latent
    Space Geometry Optimization", arXiv 2307.08347;
    https://github.com/cheliu-computation/M-FLAG-MICCAI2023, `utils/utils_trainer.py`
    (`orthogonal_loss`) and `utils/utils_builder.py`.
    """

    def __init__(self, off_diagonal: float = 0.0051) -> None:
        if off_diagonal < 0:
            raise ValueError(f"off_diagonal: must not be negative, got {off_diagonal}")
        self.off_diagonal = off_diagonal

    def __call__(self, model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
        found = next((outputs[k] for k in ("image_hidden", "hidden") if k in outputs), None)
        if found is None or found.ndim != 2:
            raise UsageError(
                "penalties.orthogonality_latent_geometry: needs a model that gives one vector of "
                "features an image, as dual and vit do"
            )
        z = precise(found)
        with torch.autocast(z.device.type, enabled=False):
            z = gathered(z, processes(model.training))
            products = z.T @ z / len(z)
            itself = torch.eye(len(products), dtype=torch.bool, device=z.device)
            on = (products.diagonal() - 1).square().sum()
            off = products.masked_fill(itself, 0).square().sum()
            return (on + self.off_diagonal * off) / 2
