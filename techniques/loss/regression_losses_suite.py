"""Regression losses by name, from a survey of fourteen for forecasting."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.losses import precise
from techniques.loss.inf_cl_tiled_contrastive import processes
from training.errors import nearest

TINY = 1e-7
"""Keras's `epsilon`; a denominator is at least this."""

Mean = Callable[[Tensor], Tensor]


class Entry(NamedTuple):
    """A loss of forecast f and label y, given the mean over all labels of a step, and the best
    constant forecast."""

    function: Callable[["RegressionLoss", Tensor, Tensor, Mean], Tensor]
    minimiser: str


class _Sum(torch.autograd.Function):
    """Over processes: every one has the sum, and everyone's gradients come back added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grads[0].contiguous(), ctx.group), None  # type: ignore[return-value]


def _root(squares: Tensor, mean: Tensor) -> Tensor:
    """squares / √mean: of the mean of the squares, shares of its root, whose mean is the root and
    has its gradient."""
    return squares / mean.clamp(min=TINY**2).sqrt()


def _squared_logs(f: Tensor, y: Tensor) -> Tensor:
    return (f.clamp(min=TINY).log1p() - y.clamp(min=TINY).log1p()).square()


def _log_cosh(x: Tensor) -> Tensor:
    return x.abs() + F.softplus(-2 * x.abs()) - math.log(2)


def _rae(own: "RegressionLoss", f: Tensor, y: Tensor, mean: Mean) -> Tensor:
    return (y - f).abs() / mean((y - mean(y)).abs()).clamp(min=TINY)


def _rse(own: "RegressionLoss", f: Tensor, y: Tensor, mean: Mean) -> Tensor:
    return (y - f).square() / mean((y - mean(y)).square()).clamp(min=TINY)


def _rmse(own: "RegressionLoss", f: Tensor, y: Tensor, mean: Mean) -> Tensor:
    squares = (y - f).square()
    return _root(squares, mean(squares))


def _nrmse(own: "RegressionLoss", f: Tensor, y: Tensor, mean: Mean) -> Tensor:
    return _root(_rmse(own, f, y, mean), mean((f - mean(f)).square()))


def _rrmse(own: "RegressionLoss", f: Tensor, y: Tensor, mean: Mean) -> Tensor:
    return _root(_rmse(own, f, y, mean), mean(f.square()))


def _rmsle(own: "RegressionLoss", f: Tensor, y: Tensor, mean: Mean) -> Tensor:
    squares = _squared_logs(f, y)
    return _root(squares, squares.mean(-1, keepdim=True) if squares.ndim > 1 else mean(squares))


def _quantile(own: "RegressionLoss", f: Tensor, y: Tensor, mean: Mean) -> Tensor:
    return torch.maximum(own.quantile * (y - f), (own.quantile - 1) * (y - f))


SUITE: dict[str, Entry] = {
    "mae": Entry(lambda own, f, y, mean: (y - f).abs(), "the median"),
    "mse": Entry(lambda own, f, y, mean: (y - f).square(), "the mean"),
    "mbe": Entry(lambda own, f, y, mean: y - f, "none: the larger the forecast, the better"),
    "rae": Entry(_rae, "the median"),
    "rse": Entry(_rse, "the mean"),
    "mape": Entry(
        lambda own, f, y, mean: 100 * (y - f).abs() / y.abs().clamp(min=TINY),
        "the median of labels weighted by 1/|y|",
    ),
    "rmse": Entry(_rmse, "the mean"),
    "msle": Entry(
        lambda own, f, y, mean: _squared_logs(f, y),
        "of positive labels, the geometric mean of 1 + y, less 1",
    ),
    "rmsle": Entry(_rmsle, "as of msle where the root is over all labels, the median where of one"),
    "nrmse": Entry(_nrmse, "none; of a + b·x: b = Var(y)/Cov(x, y), too wide"),
    "rrmse": Entry(_rrmse, "Σy²/Σy"),
    "huber": Entry(
        lambda own, f, y, mean: F.huber_loss(f, y, reduction="none", delta=own.delta),
        "c with Σ clip(y − c, −δ, δ) = 0, between the median and the mean",
    ),
    "log_cosh": Entry(
        lambda own, f, y, mean: _log_cosh(y - f), "c with Σ tanh(y − c) = 0, between these too"
    ),
    "quantile": Entry(_quantile, "the quantile"),
}
"""By the survey's names, in its order but for the last."""


class RegressionLoss(nn.Module):
    """A loss of `SUITE` by its name, of forecasts f and labels y:

    | name | loss; mean is over labels | range | gradient far from the label |
    |---|---|---|---|
    | mae | mean\\|y − f\\| | [0, ∞) | ±1 |
    | mse | mean(y − f)² | [0, ∞) | grows as the error |
    | mbe | mean(y − f), signed | (−∞, ∞) | −1, wherever the label is |
    | rae | mean\\|y − f\\| / mean\\|y − ȳ\\| | [0, ∞) | constant |
    | rse | mean(y − f)² / mean(y − ȳ)² | [0, ∞) | grows as the error |
    | mape | 100·mean(\\|y − f\\| / \\|y\\|) | [0, ∞) | constant, huge where y is near 0 |
    | rmse | √mean(y − f)² | [0, ∞) | of one alone, constant |
    | msle | mean(log(1 + f) − log(1 + y))² | [0, ∞) | falls; 0 at f below 0 |
    | rmsle | mean over rows of √(mean over the last dimension of these squares) | [0, ∞) | alike |
    | nrmse | rmse / (standard deviation of f) | [0, ∞) | of one alone, falls |
    | rrmse | √(mean(y − f)² / mean f²) | [0, ∞) | falls; the loss nears 1 |
    | huber | (y − f)²/2 up to δ, then δ·\\|y − f\\| − δ²/2 | [0, ∞) | ±δ |
    | log_cosh | mean log cosh(y − f) | [0, ∞) | ±1 |
    | quantile | mean max(q·(y − f), (q − 1)·(y − f)) | [0, ∞) | −q or 1 − q |

    `SUITE[name].minimiser` is the best constant forecast. Numbers up to 10⁴ and labels of 0 give
    finite values and gradients; denominators are at least 10⁻⁷ (Keras's, where it has one), and
    logarithms are of 1 + max(x, 10⁻⁷).

    Losses are shaped like the labels and their mean is the value above: where that has a root or a
    ratio of means over the batch (rae, rse, rmse, nrmse, rrmse, and rmsle of one label a sample), a
    label's loss is its share. These means are over the batches of all processes that train
    together, so that processes change nothing, but over a micro-batch at a time: with
    `trainer.accumulate` the objective is the mean over micro-batches, another one. In evaluation
    they are over one batch of one process.

    Args:
        name: of `SUITE`.
        delta: δ of huber; 0.5, the authors'.
        quantile: q; 0.5. The authors' has three outputs for one label, at 0.1, 0.5 and 0.9.

    Shapes: `logits` of as many elements as the real `labels` (batch, ...) to losses shaped like
    them.

    Raises:
        ValueError: when there is none of the name, naming the nearest; for a delta that is not
            positive or a quantile outside (0, 1).

    Source: "A Comprehensive Survey of Regression Based Loss Functions for Time Series Forecasting",
    arXiv 2211.02989; https://github.com/aryan-jadon/
    Regression-Loss-Functions-in-Time-Series-Forecasting-Tensorflow, `libs/utils.py` and
    `libs/tft_model_*_loss.py`. Two of the code's are not what they are called, and here are: its
    rse divides the sum of squares by itself (1, no gradient), its rmse trains mse. Its nrmse and
    rrmse divide by the forecasts' spread and size, not the labels', and its rmsle takes the root
    over the last axis, Keras's way; so they do here.
    """

    def __init__(self, name: str, delta: float = 0.5, quantile: float = 0.5) -> None:
        super().__init__()
        if name not in SUITE:
            raise ValueError(f"name: no regression loss '{name}'{nearest(name, SUITE)}")
        if delta <= 0:
            raise ValueError(f"delta: must be positive, got {delta}")
        if not 0 < quantile < 1:
            raise ValueError(f"quantile: must be in (0, 1), got {quantile}")
        self.name, self.delta, self.quantile = name, delta, quantile

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        logits, labels = outputs["logits"], batch["labels"]
        forecast = precise(logits).view(labels.shape)
        return SUITE[self.name].function(self, forecast, labels, self._mean)

    def _mean(self, x: Tensor) -> Tensor:
        """Over the labels of all processes, differentiable."""
        group = processes(self.training)
        if group is None:
            return x.mean()
        both = torch.stack([x.sum(), x.new_tensor(x.numel())])
        total, count = _Sum.apply(both, group).unbind()
        return total / count

    def extra_repr(self) -> str:
        return self.name
