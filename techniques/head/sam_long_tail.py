"""A head whose logits are cosines."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.losses import precise


class CosineHead(nn.Module):
    """Logits cos(x, wᵢ), of normalised hidden states and normalised weights.

    Args:
        in_features: features of a hidden state.
        out_features: classes.
        bias: a cosine has none; false, as the models' linear head is configured.

    Weights start uniform on [−1, 1], each class's then of length 1, as in the authors' code.

    Shapes: `(..., in_features) -> (..., out_features)`, in float32 at least.

    Raises:
        ValueError: when `bias` is set.

    Source: https://github.com/val-iisc/Saddle-LongTail, `models/resnet_cifar.py`, `NormedLinear`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        if bias:
            raise ValueError("bias: a cosine has none; set it to false")
        start = torch.empty(out_features, in_features).uniform_(-1, 1)
        self.weight = nn.Parameter(F.normalize(start, dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x, weight = precise(x), precise(self.weight)
            return F.normalize(x, dim=-1) @ F.normalize(weight, dim=-1).T

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}"
