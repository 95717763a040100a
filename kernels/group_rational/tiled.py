"""Some rows at a time, keeping `x` and the coefficients alone; on a CPU a group at a time too."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import chunks
from kernels.group_rational import reference


class GroupRational(torch.autograd.Function):
    """Forward as the reference; the backward computes both polynomials again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        if not chunks.worthwhile(x):
            rows = x.reshape(-1, x.shape[-1])
            parts = [reference.group_rational(r, numerator, denominator) for r in _chunks(rows)]
            return torch.cat(parts).view(x.shape)
        above, below = numerator.tolist(), _positive(denominator)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        rooms = chunks.buffers(6, x)
        for group, out, part in _shares(len(above), y, x):
            z, size, square, value, divisor, spare = (r[: part.numel()] for r in rooms)
            _powers(part, z, size, square)
            _polynomial(above[group], z, square, value, spare)
            _polynomial(below[group], size, square, divisor, spare)
            torch.div(value.view_as(part), divisor.view_as(part), out=out)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, numerator, denominator = ctx.saved_tensors
        if chunks.worthwhile(x) and not torch.is_grad_enabled():
            return _by_groups(x, grads[0], numerator, denominator)
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        da, db = torch.zeros_like(numerator, dtype=wide), torch.zeros_like(denominator, dtype=wide)
        slopes = []
        for part, upstream in zip(_chunks(rows), _chunks(grad)):
            slope, a, b = _gradients(part, upstream, numerator, denominator)
            slopes.append(slope)
            da, db = da + a, db + b
        dx = torch.cat(slopes).view(x.shape)
        return dx, da.to(numerator.dtype), db.to(denominator.dtype)


def _by_groups(
    x: Tensor, grad: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_gradients` in place; the coefficients' are dot products with powers of x."""
    above, below = numerator.tolist(), _positive(denominator)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    da = torch.zeros_like(numerator, dtype=torch.float64)
    db = torch.zeros_like(denominator, dtype=torch.float64)
    rooms = chunks.buffers(8, x)
    for group, out, part, upstream in _shares(len(above), dx, x, grad):
        z, size, square, value, scaled, slope, fall, spare = (r[: part.numel()] for r in rooms)
        _powers(part, z, size, square)
        _polynomial(below[group], size, square, scaled, spare)
        _polynomial(above[group], z, square, value, spare)
        value.div_(scaled)
        torch.div(upstream, scaled.view_as(part), out=scaled.view_as(part))
        _polynomial(_derived(above[group]), z, square, slope, spare)
        _polynomial(_derived(below[group]), size, square, fall, spare)
        fall.mul_(torch.sign(z, out=spare))
        torch.addcmul(slope, value, fall, value=-1, out=slope)
        torch.mul(slope.view_as(part), scaled.view_as(part), out=out)
        value.mul_(scaled).neg_()
        da[group] += _moments(scaled, torch.ones_like(z), z, square, da.shape[1])
        db[group] += _moments(value, size, square, square, db.shape[1])
    return dx, da.to(numerator.dtype), (db * denominator.sign()).to(denominator.dtype)


def _shares(groups: int, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each group's number, and its channels of some rows of each tensor."""
    rows = [t.reshape(-1, t.shape[-1]) for t in tensors]
    width = tensors[0].shape[-1] // groups
    step = max(chunks.ELEMENTS // max(width, 1), 1)
    for group in range(groups):
        own = (t[:, group * width : (group + 1) * width].split(step) for t in rows)
        yield from ((group, *parts) for parts in zip(*own))


def _powers(part: Tensor, z: Tensor, size: Tensor, square: Tensor) -> None:
    z.view_as(part).copy_(part)
    torch.abs(z, out=size)
    torch.mul(z, z, out=square)


def _polynomial(
    coefficients: list[float], z: Tensor, square: Tensor, out: Tensor, spare: Tensor
) -> None:
    """c₀ + c₁z + ..., two terms a pass."""
    pairs = [coefficients[i : i + 2] for i in range(0, len(coefficients), 2)]
    _line(pairs[-1], z, out)
    for pair in pairs[-2::-1]:
        _line(pair, z, spare)
        torch.addcmul(spare, square, out, out=out)


def _line(pair: list[float], z: Tensor, out: Tensor) -> None:
    if len(pair) == 1:
        out.fill_(pair[0])
    else:
        torch.add(z.new_tensor(pair[0]), z, alpha=pair[1], out=out)


def _derived(coefficients: list[float]) -> list[float]:
    return [k * c for k, c in enumerate(coefficients)][1:] or [0.0]


def _moments(weights: Tensor, first: Tensor, second: Tensor, square: Tensor, count: int) -> Tensor:
    """Σ weights·first, Σ weights·second, then both with x², x⁴, ...; `weights` is used up."""
    found = []
    for k in range(count):
        if k and k % 2 == 0:
            weights.mul_(square)
        found.append(torch.dot(weights, second if k % 2 else first))
    return torch.stack(found).double()


def _positive(denominator: Tensor) -> list[list[float]]:
    return [[1.0, *row] for row in denominator.abs().tolist()]


def _gradients(
    x: Tensor, grad: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    z, g = reference.grouped(x, len(numerator)), reference.grouped(grad, len(numerator))
    size, sign, positive = z.abs(), z.sign(), denominator.abs()
    below = 1 + size * reference.horner(size, positive)
    value = reference.horner(z, numerator) / below
    scaled = g / below
    order = torch.arange(1, numerator.shape[1], device=x.device)
    above_slope = reference.horner(z, numerator[:, 1:] * order)
    order = torch.arange(1, denominator.shape[1] + 1, device=x.device)
    below_slope = sign * reference.horner(size, positive * order)
    slope = scaled * (above_slope - value * below_slope)
    da, db = [], []
    power = scaled
    for _ in range(numerator.shape[1]):
        da.append(power.sum((0, 2)))
        power = power * z
    power = -scaled * value
    for _ in range(denominator.shape[1]):
        power = power * size
        db.append(power.sum((0, 2)))
    return (
        slope.flatten(-2).to(x.dtype),
        torch.stack(da, dim=1),
        torch.stack(db, dim=1) * denominator.sign(),
    )


def _chunks(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(chunks.ELEMENTS // max(rows.shape[-1], 1), 1))
