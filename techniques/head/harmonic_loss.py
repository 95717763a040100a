"""The harmonic loss, as a head whose softmax is the harmonic max."""

import torch
from torch import Tensor, nn


class HarmonicHead(nn.Module):
    """Logits −n·log‖x − wᵢ‖, so that softmax is the harmonic max: pᵢ = dᵢ⁻ⁿ / Σⱼ dⱼ⁻ⁿ.

    Cross-entropy on these logits is the harmonic loss −log p_y. It does not change when hidden
    states and weights are scaled together, and its optimum is finite: w_y is the class's centre.

    Args:
        in_features: features of a hidden state.
        out_features: classes.
        exponent: n, positive; default √in_features, the paper's scaling. The authors' small models
            and GPT-2 raise *squared* distances to −n, so their n is half of this one.
        eps: added to the squared distances, 1e-4 as in the authors' small models.
        bias: a distance has none; false, as the models' linear head is configured.

    Weights start from N(0, 0.56² / in_features), as in the authors' GPT-2.

    Shapes: `(..., in_features) -> (..., out_features)`, in float32 at least.

    Raises:
        ValueError: when `exponent` or `eps` is not positive, or `bias` is set.

    Source: "Harmonic Loss Trains Interpretable AI Models", arXiv 2502.01628;
    https://github.com/KindXiaoming/grow-crystals, `src/utils/model.py`, `GPT2/model_l2loss.py`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        exponent: float | None = None,
        eps: float = 1e-4,
        bias: bool = False,
    ) -> None:
        super().__init__()
        n = in_features**0.5 if exponent is None else exponent
        for name, value in {"exponent": n, "eps": eps}.items():
            if value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        if bias:
            raise ValueError("bias: the harmonic head has none; set it to false")
        self.exponent, self.eps = n, eps
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * 0.56 / in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        # ‖x‖² + ‖w‖² − 2x·w cancels near a class's centre, so never in half precision.
        with torch.autocast(x.device.type, enabled=False):
            x, weight = x.to(self.weight.dtype), self.weight
            squares = x.square().sum(-1, keepdim=True) + weight.square().sum(-1)
            distance = (squares - 2 * x @ weight.T).clamp(min=0) + self.eps
            return -self.exponent / 2 * distance.log()

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, exponent={self.exponent}, eps={self.eps}"
