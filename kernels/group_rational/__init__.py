"""Rational functions with coefficients by group of channels."""

from torch import Tensor

from kernels.backend import choose
from kernels.group_rational import reference, tiled


def group_rational(
    x: Tensor, numerator: Tensor, denominator: Tensor, *, backend: str = "auto"
) -> Tensor:
    """(a₀ + a₁x + ... + a_m xᵐ) / (1 + |b₁x| + ... + |b_n xⁿ|), coefficients by group of channels.

    The Kolmogorov-Arnold Transformer's activation (arXiv 2409.10594) as its released code has it:
    each term of the denominator is made positive by itself. Half-precision inputs are computed in
    float32. The backward keeps only `x` and the coefficients, whose gradients are reduced block by
    block and then once (the remedy of FlashKAT, arXiv 2505.13813, for contended atomics).

    Args:
        x: (..., channels), floating point.
        numerator: (groups, m + 1), a₀ first; `groups` divides `channels`, and group g acts on the
            g-th run of channels/groups.
        denominator: (groups, n), b₁ first.
        backend: `"auto"`, `"reference"`, `"tiled"` or `"triton"`; Triton takes m ≤ 5 and n ≤ 4.

    Returns:
        The same shape and dtype as `x`.

    Raises:
        ValueError: for shapes that do not fit, coefficients of another device, or a backend that
            is not there or cannot take them.
    """
    if not x.is_floating_point() or not x.ndim:
        raise ValueError(f"x: expected floating point (..., channels), got {x.dtype} {x.shape}")
    for name, value in {"numerator": numerator, "denominator": denominator}.items():
        if value.ndim != 2 or not value.shape[1]:
            raise ValueError(f"{name}: expected (groups, coefficients), got {tuple(value.shape)}")
    groups = numerator.shape[0]
    if denominator.shape[0] != groups:
        raise ValueError(f"denominator: expected {groups} groups, got {denominator.shape[0]}")
    if x.shape[-1] % groups:
        raise ValueError(f"numerator: {groups} groups do not divide {x.shape[-1]} channels")
    chosen = choose(backend, x, numerator, denominator)
    if chosen == "triton" and (numerator.shape[1] > 6 or denominator.shape[1] > 4):
        if backend == "triton":
            raise ValueError("numerator, denominator: Triton takes up to 6 and 4 coefficients")
        chosen = "tiled"
    if chosen == "reference":
        return reference.group_rational(x, numerator, denominator)
    if chosen == "tiled":
        return tiled.GroupRational.apply(x, numerator, denominator)  # type: ignore[return-value]
    from kernels.group_rational import triton

    return triton.GroupRational.apply(x, numerator, denominator)  # type: ignore[return-value]
