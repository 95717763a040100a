"""GoLU, the Gompertz linear unit: x · α·exp(−β·exp(−γ·x))."""

from torch import Tensor

from kernels.backend import choose
from kernels.golu import reference, tiled


def golu(
    x: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """x · α·exp(−β·exp(−γ·x)), elementwise (GoLU, arXiv 2502.03654).

    Half-precision inputs are computed in float32. The backward keeps only `x`; `"reference"` and
    `"tiled"` can be differentiated twice.

    Args:
        x: any shape, floating point.
        alpha, beta, gamma: asymptote, displacement and rate of the gate, positive.
        backend: `"auto"`, `"reference"`, `"tiled"` or `"triton"`.

    Returns:
        The same shape and dtype as `x`.

    Raises:
        ValueError: for an `x` that is not floating point, a parameter that is not positive, or a
            backend that is not there.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating point, got {x.dtype}")
    for name, value in {"alpha": alpha, "beta": beta, "gamma": gamma}.items():
        if value <= 0:
            raise ValueError(f"{name}: must be positive, got {value}")
    chosen = choose(backend, x)
    if chosen == "reference":
        return reference.golu(x, alpha, beta, gamma)
    if chosen == "tiled":
        return tiled.GoLU.apply(x, alpha, beta, gamma)  # type: ignore[return-value]
    from kernels.golu import triton

    return triton.GoLU.apply(x, alpha, beta, gamma)  # type: ignore[return-value]
