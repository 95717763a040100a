"""GoLU, the Gompertz linear unit."""

from torch import Tensor, nn

from kernels.golu import golu


class GoLU(nn.Module):
    """GoLU(x) = x · α·exp(−β·exp(−γ·x)), elementwise, any shape.

    The gate is the Gompertz function, the distribution function of a standard Gumbel variable when
    α = β = γ = 1. Unlike the gates of GELU and Swish it is asymmetric, with a smaller slope near
    the origin, which lowers the variance of the output.

    Args:
        alpha: upper asymptote of the gate.
        beta: displacement of the gate along the input axis.
        gamma: growth rate of the gate.

    The defaults, 1, are the paper's and its code's.

    Raises:
        ValueError: when one of them is not positive (the gate would lose its S shape).

    Source: "Gompertz Linear Units: Leveraging Asymmetry for Enhanced Learning Dynamics", arXiv
    2502.03654; https://github.com/automl/GoLU, `golu/golu_activation.py`.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        for name, value in {"alpha": alpha, "beta": beta, "gamma": gamma}.items():
            if value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        self.alpha, self.beta, self.gamma = alpha, beta, gamma

    @property
    def elementwise(self) -> tuple[str, dict[str, float]]:
        """Its name and parameters among `kernels.gated`'s activations."""
        return "golu", {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma}

    def forward(self, x: Tensor) -> Tensor:
        return golu(x, self.alpha, self.beta, self.gamma)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}"
