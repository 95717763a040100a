"""Backpropagation through some of the samples and tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def vcas(model: nn.Module) -> None:
    """Sample the backward pass of a model's blocks, the members of its `nn.ModuleList`s:

    - of what a block puts out, G (samples, ...), sample i is kept with probability pᵢ and its
      gradient divided by it, or dropped, so that whatever is below has less to do: pᵢ ∝ ‖Gᵢ‖,
      cut off at 1, with `ratio` · samples as their sum;
    - for a linear layer's weight, row i of the kept samples, in the same way: pᵢ ∝ ‖Gᵢ‖‖xᵢ‖.

    Both are unbiased. The products of linear layers leave out what is dropped; attention and norms
    compute with its zeros, as in the code. The ratios are 1 until `techniques.callback.vcas` lowers
    them. The gradient of a linear layer's bias is that of all kept rows.

    Args:
        model: changed in place; its layers keep their parameters.

    Raises:
        ValueError: for a model without blocks that have linear layers.

    Source: "Efficient Backpropagation with Variance-Controlled Adaptive Sampling", arXiv
    2402.17227; https://github.com/thu-ml/VCAS, `vcas/layers/` and `vcas/model_processor.py`. There
    layers are told which samples were kept; here they look which have a gradient. The code keeps
    all samples when none was drawn, which is biased, and skips sampling where fewer than one row
    would be kept; here one is.
    """
    for block in blocks(model):
        layers = [name for name, layer in block.named_modules() if type(layer) is nn.Linear]
        for name in layers:
            block.set_submodule(name, SampledLinear(block.get_submodule(name)))
        if layers:
            block.add_module("sampler", Sampler())
            block.register_forward_hook(_sample_output)
    if not samplers(model):
        raise ValueError("reparam.vcas: the model has no list of blocks with linear layers")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the model's outermost lists of modules."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{o}.") for o in lists)]
    return [block for modules in outer for block in modules]


def samplers(model: nn.Module) -> list["Sampler"]:
    """Those of a model, in the order of its blocks."""
    return [m for m in model.modules() if isinstance(m, Sampler)]


def sampled_linears(model: nn.Module) -> list["SampledLinear"]:
    """Those of a model, in its order."""
    return [m for m in model.modules() if isinstance(m, SampledLinear)]


class Sampler(nn.Module):
    """The identity, whose gradient is that of some samples.

    `ratio` is the expected share of samples kept. All are while `exact` is true, and while `norms`
    is a list, to which the norms of their gradients go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ratio, self.exact = 1.0, False
        self.norms: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return _uncompiled(_Sample, x, self)


def _apply(function: Any, *args: Any) -> Tensor:
    return function.apply(*args)


# The shapes of the backward pass depend on the data.
_uncompiled: Any = torch.compiler.disable(_apply)


def _sample_output(block: Any, _: Any, output: Any) -> Any:
    if isinstance(output, tuple):  # of some of transformers' blocks, hidden states first
        return block.sampler(output[0]), *output[1:]
    return block.sampler(output)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sampler: Sampler) -> Tensor:
        ctx.sampler = sampler
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        sampler = ctx.sampler
        if sampler.norms is None and (sampler.exact or sampler.ratio >= 1):
            return grad, None
        norms = row_norms(grad.flatten(1))
        if sampler.norms is not None:
            sampler.norms.append(norms)
            return grad, None
        probabilities = keep_probabilities(norms, sampler.ratio)
        factors = (torch.rand_like(norms) < probabilities) / probabilities.clamp_min(1e-30)
        return grad * factors.to(grad.dtype).view(-1, *[1] * (grad.ndim - 1)), None


class SampledLinear(nn.Linear):
    """A linear layer with the weight and bias of another and a sampled gradient.

    `ratio` is the expected share of rows kept for the weight's gradient, of those of samples that
    have a gradient. While `exact` is true all are. While `variance` is a number no row is dropped,
    and what dropping some would add to the variance of the weight's gradient is added to it.

    Args:
        layer: whose parameters it takes over.
    """

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would draw a weight
        assert isinstance(layer, nn.Linear)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.ratio, self.exact = 1.0, False
        self.variance: float | None = None

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, bias = self.weight, self.bias
        if self.exact:
            return nn.functional.linear(x, weight, bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return _uncompiled(_Linear, x, weight, bias, self)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: SampledLinear
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        kept = grad.flatten(1).any(1).nonzero().squeeze(1)
        grads, inputs = grad[kept].flatten(0, -2), x[kept].flatten(0, -2)
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = torch.zeros_like(x)
            for_x[kept] = (grads @ weight).view(len(kept), *x.shape[1:])
        if ctx.needs_input_grad[1]:
            for_weight = _weight_gradient(grads, inputs, ctx.layer)
        if ctx.needs_input_grad[2]:
            for_bias = grads.sum(0)
        return for_x, for_weight, for_bias, None


def _weight_gradient(grads: Tensor, inputs: Tensor, layer: SampledLinear) -> Tensor:
    """Gᵀx of some of the rows of G (rows, out) and x (rows, in)."""
    if layer.variance is None and layer.ratio >= 1:
        return grads.T @ inputs
    scores = row_norms(grads) * row_norms(inputs)
    probabilities = keep_probabilities(scores, layer.ratio)
    if layer.variance is not None:
        layer.variance += added_variance(scores, probabilities).item()
        return grads.T @ inputs
    kept = (torch.rand_like(scores) < probabilities).nonzero().squeeze(1)
    scaled = grads[kept] / probabilities[kept, None].to(grads.dtype)
    return scaled.T @ inputs[kept]


def row_norms(x: Tensor) -> Tensor:
    """Of x (n, d), in float32 at least."""
    return x.norm(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


def keep_probabilities(scores: Tensor, ratio: float) -> Tensor:
    """min(1, c · score) of scores (n,) that are not negative, with the c for which the sum is
    ⌊ratio · n⌋, at least 1; where fewer scores than that are positive, those have 1."""
    n = len(scores)
    k = max(1, int(n * ratio))
    if k >= n:
        return torch.ones_like(scores)
    ordered = scores.sort().values
    sums = ordered.cumsum(0)
    # If just the m smallest are below 1, c is (k − n + m) / (sum of them).
    left = torch.arange(k - n + 1, k + 1, device=scores.device)
    m = int((left * ordered <= sums).sum())
    return (scores * (k - n + m) / sums[m - 1].clamp_min(1e-30)).clamp_max(1)


def added_variance(scores: Tensor, probabilities: Tensor) -> Tensor:
    """Σᵢ (1/pᵢ − 1)·scoreᵢ²: what keeping with pᵢ adds to the variance of a sum of terms with these
    norms, summed over its entries."""
    return (scores.square() * (1 / probabilities.clamp_min(1e-30) - 1)).sum()
