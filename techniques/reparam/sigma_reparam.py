"""σReparam."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


class SpectralScale(nn.Module):
    """γ / σ(W) · W, with σ the spectral norm and γ a learned scalar.

    σ = vᵀWu, where u and v follow the singular vectors by one power iteration a training forward;
    the gradient flows through W and not through u and v. Both start from a singular value
    decomposition, and γ at the first σ, so that the weight starts as it was.

    Args:
        weight: (out, in, ...), which it will reparametrise; a convolution's is taken as the matrix
            (out, in · kernel).
    """

    u: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        _, values, right = torch.linalg.svd(weight.detach().flatten(1).float(), full_matrices=False)
        self.register_buffer("u", right[0].clone())
        self.gamma = nn.Parameter(values[:1].clone())

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        # Under autocast a product in bfloat16 would be the norm to three digits only.
        with torch.autocast(weight.device.type, enabled=False):
            with torch.no_grad():
                v = F.normalize(matrix.mv(self.u), dim=0)
                u = F.normalize(matrix.T.mv(v), dim=0)
                if self.training:
                    self.u.copy_(u)
            sigma = (v * matrix.mv(u)).sum()
        return self.gamma / sigma * weight


def sigma_reparam(model: nn.Module) -> None:
    """Reparametrise the weight of every linear and convolutional layer by `SpectralScale`.

    Raises:
        ValueError: for a model without such a layer.

    Source: "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", arXiv
    2303.06296; https://github.com/apple/ml-sigma-reparam, `vision/layers.py`.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    if not layers:
        raise ValueError("the model has no linear or convolutional layer")
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", SpectralScale(layer.weight))
