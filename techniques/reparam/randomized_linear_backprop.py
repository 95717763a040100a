"""Linear layers that keep a random sketch of their input for the backward pass."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from techniques.reparam.adapters import find_targets

KINDS = ("gaussian", "rademacher", "dct")
BLOCK = 256
"""Rows of the input that are sketched at a time: the sketch's matrix is never whole."""


def randomized_linear_backprop(
    model: nn.Module,
    *,
    ratio: float = 0.5,
    sketch: str = "gaussian",
    targets: str = ".",
) -> None:
    """Let linear layers y = xWᵀ + b keep S·x (k, in) in place of x (rows, in) and estimate

        ∂W = (S·G)ᵀ(S·x),  S (k, rows) random with E[SᵀS] = 1,  k = ⌊ratio · rows⌋

    of the gradient G (rows, out): unbiased. The gradients of x and b are exact. Rows are samples,
    or samples times positions. S is made again from its seed, which torch's generator draws in the
    forward pass, and of `sketch`

        gaussian     N(0, 1/k)
        rademacher   ±1/√k
        dct          √(rows/k) times k rows of the orthonormal DCT-II, drawn with replacement

    The variance of ∂W, summed over its entries, with Gaussian S is
    (‖x‖²‖G‖² + ‖xᵀG‖²) / k. The authors' estimate of it, for any S, has a minus.

    Args:
        model: changed in place; its layers keep their parameters.
        ratio: kept rows over rows, in (0, 1]. The paper has 0.5, 0.2 and 0.1; this default is ours.
        sketch: "gaussian" as in the code.
        targets: regular expression, searched in the names of linear layers; all, as in the code.

    Raises:
        ValueError: for a ratio or sketch that is none, or when no linear layer matches.

    Source: "Memory-Efficient Backpropagation through Large Linear Layers", arXiv 2201.13195;
    https://github.com/SkoltechAI/fewbit, `fewbit/functional/linear.py` (`LinearGRPFunc`) and
    `fewbit/modules/variance.py`. Its "dct" and "dft" scale by k·rows, where rows/k is unbiased;
    "dft", whose sketch is complex and so twice as large, is left out.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: must be in (0, 1], got {ratio}")
    if sketch not in KINDS:
        raise ValueError(f"sketch: one of {', '.join(KINDS)}, got '{sketch}'")
    found = find_targets(model, targets)
    layers = {name: layer for name, layer in found.items() if type(layer) is nn.Linear}
    if not layers:
        raise ValueError(f"targets: no plain linear layer's name matches '{targets}'")
    for name, layer in layers.items():
        model.set_submodule(name, RandomizedLinear(layer, ratio, sketch))


class RandomizedLinear(nn.Linear):
    """A linear layer with the weight and bias of another and a sketched gradient.

    While `exact` is true its gradient is exact. Without one to be taken of its weight it keeps
    nothing and draws nothing.

    Args:
        layer: whose parameters it takes over.
        ratio, sketch: as for `randomized_linear_backprop`.
    """

    exact = False

    def __init__(self, layer: nn.Linear, ratio: float, sketch: str) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would draw a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.ratio, self.sketch = ratio, sketch

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, bias = self.weight, self.bias
        if self.exact or not (torch.is_grad_enabled() and weight.requires_grad):
            return nn.functional.linear(x, weight, bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        rows = max(1, int(self.ratio * (x.numel() // x.shape[-1])))
        return _Linear.apply(x, weight, bias, rows, self.sketch)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio}, sketch={self.sketch}"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, kind: str
    ) -> Tensor:
        sketch, seed = sketch_anew(x.flatten(0, -2), rows, kind)
        ctx.save_for_backward(sketch, weight, seed)
        ctx.rows, ctx.kind = rows, kind
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, seed = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        for_x = grad @ weight if ctx.needs_input_grad[0] else None
        for_weight = sketched(rows, seed, ctx.rows, ctx.kind).T @ x
        for_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return for_x, for_weight, for_bias, None, None


# A compiler may draw a seed of torch.randint again in the backward pass, so it is drawn in here.
@torch.library.custom_op(
    "assay::sketch_anew", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def sketch_anew(x: Tensor, rows: int, kind: str) -> tuple[Tensor, Tensor]:
    """S·x of x (m, n) for a seed that torch's generator draws, and the seed."""
    seed = torch.randint(2**62, ())
    return sketched(x, seed, rows, kind), seed


@sketch_anew.register_fake
def _(x: Tensor, rows: int, kind: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(rows, x.shape[1]), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("assay::sketched", mutates_args=())
def sketched(x: Tensor, seed: Tensor, rows: int, kind: str) -> Tensor:
    """S·x (rows, n) of x (m, n), summed in float32 at least; S (rows, m) depends on the seed, the
    device and the number of rows alone."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    wide = torch.promote_types(x.dtype, torch.float32)
    like: dict[str, Any] = {"generator": generator, "device": x.device}
    chosen = torch.randint(len(x), (rows, 1), **like) if kind == "dct" else None
    total = x.new_zeros(rows, x.shape[1], dtype=wide)
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        if chosen is not None:
            column = torch.arange(start, start + len(part), device=x.device, dtype=wide)
            wave = torch.cos(math.pi / len(x) * (column + 0.5) * chosen)
            matrix = wave * torch.where(chosen.bool(), 2.0, 1.0).to(wide).sqrt()
        elif kind == "gaussian":
            matrix = torch.randn(rows, len(part), **like, dtype=wide)
        else:
            matrix = 2 * torch.randint(2, (rows, len(part)), **like, dtype=wide) - 1
        matrix /= math.sqrt(rows)
        total += matrix.to(x.dtype) @ part
    return total.to(x.dtype)


@sketched.register_fake
def _(x: Tensor, seed: Tensor, rows: int, kind: str) -> Tensor:
    return x.new_empty(rows, x.shape[1])
