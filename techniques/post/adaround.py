"""AdaRound: whether a weight is rounded up or down is learned, so that a layer's outputs stay."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from techniques.post import grids
from techniques.post.layers import Layer, give, inputs, linear_layers, matrix
from training.errors import UsageError, nearest
from training.evaluate import evaluate
from training.packing import Affine

if TYPE_CHECKING:
    from training.run import Run

LOW, HIGH = -0.1, 1.1
"""What the sigmoid is stretched to, before it is cut to 0 and 1."""


class AdaRound:
    """Quantises every linear and convolutional layer, in turn, to
    W̃ = s·(clip(⌊W/s⌋ + z + h(V), 0, 2^bits − 1) − z), h(V) = clip(1.2·sigmoid(V) − 0.1, 0, 1).

    V is trained by Adam, from h(V) = W/s − ⌊W/s⌋, to make least

    mean ‖W x − W̃ x̃‖² + λ·Σ (1 − |2h(V) − 1|^β),

    the mean over minibatches of unlabelled samples and their positions; x is what the layer gets in
    the model as it was and x̃ what the layers quantised before it give. During `warmup` λ is 0; then
    β falls from the first of `beta` to the second in a line, and h goes to 0 or 1. At last h is 1
    where V ≥ 0, else 0. Grids are from each row's least to its largest weight, as of
    `techniques.post.quantise.Quantise`.

    The paper and the authors' code compare what follows the layer's activation function; here it is
    what comes before it. AIMET's β falls along a cosine, BRECQ's, followed here, in a line.

    Args:
        bits: 2 to 8.
        samples: of the training set; 1024 as BRECQ.
        steps: of each layer; 15000, AIMET's below 8 bits (BRECQ: 20000).
        batch: samples of a step; 32.
        lr: Adam's; 1e-3.
        coefficient: λ; 0.01.
        beta: where β starts and ends; 20 and 2.
        warmup: share of the steps; 0.2.
        exclude: regular expression of names of layers that are left as they are.

    Recorded: `post/adaround/flipped`, the share of weights not rounded to the nearest.

    Raises:
        ValueError: for an argument out of range.
        UsageError: when it is applied, when no layer is left.

    Source: "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568;
    https://github.com/yhhhli/BRECQ, `quant/adaptive_rounding.py`, `quant/layer_recon.py` and
    `main_imagenet.py`; https://github.com/quic/aimet (by the authors),
    `aimet_torch/adaround/`: `adaround_loss.py`, `adaround_optimizer.py`, `adaround_weight.py`.
    """

    def __init__(
        self,
        bits: int = 4,
        samples: int = 1024,
        steps: int = 15000,
        batch: int = 32,
        lr: float = 1e-3,
        coefficient: float = 0.01,
        beta: Sequence[float] = (20.0, 2.0),
        warmup: float = 0.2,
        exclude: str | None = None,
    ) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"bits: must be between 2 and 8, got {bits}")
        if min(samples, steps, batch) < 1:
            raise ValueError(f"samples, steps, batch: at least 1, got {samples, steps, batch}")
        if not (lr > 0 and coefficient >= 0 and 0 <= warmup < 1):
            raise ValueError(
                f"lr: above 0, coefficient: at least 0, warmup: in [0, 1), "
                f"got {lr, coefficient, warmup}"
            )
        if len(beta) != 2 or min(beta) <= 0:
            raise ValueError(f"beta: two numbers above 0, got {list(beta)}")
        self.bits, self.samples, self.steps, self.batch = bits, samples, steps, batch
        self.lr, self.coefficient, self.warmup = lr, coefficient, warmup
        self.beta, self.exclude = (beta[0], beta[1]), exclude

    def __call__(self, run: "Run") -> None:
        """Quantise the run's model."""
        layers = linear_layers(run.model, self.exclude)
        dense = {name: matrix(layer) for name, layer in layers.items()}
        done: dict[str, Tensor] = {}
        flipped = 0
        count = min(self.samples, len(run.task.train))
        generator = torch.Generator().manual_seed(run.config["seed"])  # in every process the same
        for name, layer in layers.items():
            _put(layers, dense)
            target = inputs(run, {name: layer}, count)
            _put(layers, dense | done)
            if name not in target:  # the model does not call it
                continue
            given = inputs(run, {name: layer}, count)[name]
            weight = dense[name]
            scale, zero = grids.minmax(weight, self.bits)
            wanted = (target[name].float() @ weight.T).view(count, -1, len(weight))
            x = given.float().view(count, -1, weight.shape[1])
            up = self.learned(weight, scale, zero, x, wanted, generator) >= 0
            done[name] = rounded(weight, scale, zero, self.bits, up.to(weight))
            flipped += int((done[name] != grids.quantised(weight, scale, zero, self.bits)).sum())
            run.grids[f"{name}.weight"] = Affine(scale, zero, self.bits)
        _put(layers, dense | done)
        total = sum(value.numel() for value in done.values())
        run.record({"post/adaround/flipped": flipped / total})

    @torch.enable_grad()
    def learned(
        self,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor,
        x: Tensor,
        wanted: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """V of one layer, (rows, columns).

        Args:
            weight: (rows, columns).
            scale, zero: (rows, 1).
            x: (samples, positions, columns).
            wanted: (samples, positions, rows), the outputs without their bias.
            generator: of the minibatches.
        """
        v = start(weight, scale).requires_grad_()
        optimizer = torch.optim.Adam([v], lr=self.lr)
        for step in range(self.steps):
            chosen = torch.randperm(len(x), generator=generator)[: self.batch].to(x.device)
            found = x[chosen] @ rounded(weight, scale, zero, self.bits, soft(v)).T
            loss = (found - wanted[chosen]).square().sum(-1).mean()
            beta = annealed(step, self.steps, self.warmup, self.beta)
            if beta is not None:
                loss = loss + self.coefficient * (1 - (2 * soft(v) - 1).abs().pow(beta)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return v.detach()


class RandomRounding:
    """How well a model does that is rounded up or down at random: W/s up with the probability of
    its fraction. The model is left rounded to the nearest.

    Recorded: `post/random_rounding/best` and `/mean` of `metric` over the draws, and `/better`, the
    share of draws that are better than the nearest.

    Args:
        bits: 2 to 8, on the grid of `techniques.post.quantise.Quantise`.
        draws: 100.
        metric: as evaluation names it.
        direction: of a better `metric`, "lower" or "higher".
        exclude: regular expression of names of layers that are left as they are.

    Raises:
        ValueError: for an argument out of range.
        UsageError: when it is applied, for an unknown metric.

    Source: the experiment that the AdaRound paper begins with, arXiv 2004.10568.
    """

    def __init__(
        self,
        bits: int = 4,
        draws: int = 100,
        metric: str = "val/loss",
        direction: str = "lower",
        exclude: str | None = None,
    ) -> None:
        if not 2 <= bits <= 8 or draws < 1:
            raise ValueError(f"bits: between 2 and 8, draws: at least 1, got {bits, draws}")
        if direction not in ("lower", "higher"):
            raise ValueError(f"direction: one of lower, higher, got '{direction}'")
        self.bits, self.draws, self.metric, self.exclude = bits, draws, metric, exclude
        self.sign = 1 if direction == "higher" else -1

    @torch.no_grad()
    def __call__(self, run: "Run") -> None:
        """Try them."""
        layers = linear_layers(run.model, self.exclude)
        dense = {name: matrix(layer) for name, layer in layers.items()}
        found = {name: grids.minmax(weight, self.bits) for name, weight in dense.items()}
        generator = torch.Generator().manual_seed(run.config["seed"])  # in every process the same
        scores = []
        for _ in range(self.draws):
            drawn = {}
            for name, weight in dense.items():
                chance = torch.rand(weight.shape, generator=generator).to(weight)
                up = (chance < fraction(weight, found[name][0])).to(weight)
                drawn[name] = rounded(weight, *found[name], self.bits, up)
            _put(layers, drawn)
            scores.append(self._score(run))
        for name, weight in dense.items():
            give(layers[name], grids.quantised(weight, *found[name], self.bits))
            run.grids[f"{name}.weight"] = Affine(*found[name], self.bits)
        own = self._score(run)
        run.record(
            {
                "post/random_rounding/best": self.sign * max(scores),
                "post/random_rounding/mean": self.sign * sum(scores) / len(scores),
                "post/random_rounding/better": sum(s > own for s in scores) / len(scores),
            }
        )

    def _score(self, run: "Run") -> float:
        found = evaluate(run)
        if self.metric not in found:
            raise UsageError(
                f"post.random_rounding.metric: no metric '{self.metric}'"
                f"{nearest(self.metric, found)}"
            )
        return self.sign * found[self.metric]


def fraction(weight: Tensor, scale: Tensor) -> Tensor:
    """W/s − ⌊W/s⌋."""
    return weight / scale - (weight / scale).floor()


def start(weight: Tensor, scale: Tensor) -> Tensor:
    """V with h(V) the fraction, so that the weight is at first as it was."""
    share = (fraction(weight, scale) - LOW) / (HIGH - LOW)
    return share.logit()


def soft(v: Tensor) -> Tensor:
    """h(V)."""
    return (torch.sigmoid(v) * (HIGH - LOW) + LOW).clamp(0, 1)


def rounded(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, up: Tensor) -> Tensor:
    """W̃ with `up` in the place of h(V)."""
    codes = ((weight / scale).floor() + zero + up).clamp(0, 2**bits - 1)
    return scale * (codes - zero)


def annealed(step: int, steps: int, warmup: float, ends: tuple[float, float]) -> float | None:
    """β of a step, counted from 0; none during the warmup."""
    first = warmup * steps
    if step + 1 < math.ceil(first):
        return None
    left = 1 - (step + 1 - first) / (steps - first)
    return ends[1] + (ends[0] - ends[1]) * left


def _put(layers: dict[str, Layer], weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        give(layers[name], weight)
