"""Training with some of a transformer's blocks: layer stacking and layer dropping."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from techniques.init.lir_tvr import numbered_blocks

if TYPE_CHECKING:
    from training.run import Run


class LayerStacking:
    """The model grows: its first blocks train alone, and double when it is time.

    With n blocks at work, block i + n takes the weights of block i for all i < n, and the optimizer
    starts anew. The others pass on what they get, in evaluation too.

    Args:
        at: steps before which the blocks double, ascending; the depth is halved as often to begin
            with. The authors double at 1/8 and 3/10 of the budget.

    Raises:
        ValueError: for steps that do not ascend; at the start, for a model whose depth cannot be
            halved so often.

    Not for several processes, which expect a gradient of every parameter.

    Source: "No Train No Gain: Revisiting Efficient Training Algorithms For Transformer-based
    Language Models", arXiv 2307.06440, after "Efficient Training of BERT by Progressively
    Stacking" (Gong et al., 2019); https://github.com/JeanKaddour/NoTrainNoGain,
    `bert/efficient_training/stacking.py` and `bert/cramming/config/train/bert-o3.yaml`.
    """

    def __init__(self, at: list[int]) -> None:
        if sorted(set(at)) != list(at) or not at or at[0] < 1:
            raise ValueError(f"at: ascending steps, got {at}")
        self.at = list(at)

    def on_fit_start(self, run: "Run") -> None:
        """Halve the depth."""
        depth = len(numbered_blocks(run.model))
        if depth % 2 ** len(self.at):
            raise ValueError(f"model.depth: cannot be halved {len(self.at)} times, got {depth}")
        self._set(run)

    def on_batch(self, run: "Run") -> None:
        """Grow."""
        if run.step not in self.at:
            return
        blocks = [block for _, block in numbered_blocks(run.model)]
        working = self._set(run) // 2
        for lower, upper in zip(blocks, blocks[working : 2 * working]):
            upper.load_state_dict(lower.state_dict())
        run.optimizer.state.clear()

    def _set(self, run: "Run") -> int:
        """Put the step's blocks to work; how many they are."""
        blocks = [block for _, block in numbered_blocks(run.model)]
        working = len(blocks) // 2 ** sum(run.step < step for step in self.at)
        for number, block in enumerate(blocks):
            skip(block, number >= working)
        return working


class LayerDropping:
    """Progressive layer dropping: each step leaves out blocks, the later and the further on in
    training the likelier.

    Of L blocks the i-th, from 1, is left out at step t of T with probability
    i/L · (1 − θ)·(1 − exp(−γ·t/T)). What remains is not rescaled, and evaluation uses all.

    Args:
        theta: θ, 0.5 as in the code.
        gamma: γ, 100 as in the code.

    Raises:
        ValueError: for a θ outside [0, 1] or a negative γ.

    Not for several processes, which expect a gradient of every parameter. Where the code, all
    blocks being left out, takes all, none is taken here.

    Source: as `LayerStacking`, after "Accelerating Training of Transformer-Based Language Models
    with Progressive Layer Dropping", arXiv 2010.13369; `bert/efficient_training/layer_drop.py`.
    """

    def __init__(self, theta: float = 0.5, gamma: float = 100.0) -> None:
        if not 0 <= theta <= 1:
            raise ValueError(f"theta: must be in [0, 1], got {theta}")
        if gamma < 0:
            raise ValueError(f"gamma: must not be negative, got {gamma}")
        self.theta, self.gamma = theta, gamma

    def probabilities(self, depth: int, progress: float) -> Tensor:
        """Of leaving out each block."""
        largest = (1 - self.theta) * (1 - math.exp(-self.gamma * progress))
        return largest * torch.arange(1, depth + 1) / depth

    def on_batch(self, run: "Run") -> None:
        """Draw the step's blocks."""
        blocks = [block for _, block in numbered_blocks(run.model)]
        drawn = torch.rand(len(blocks)) < self.probabilities(len(blocks), run.step / run.max_steps)
        for block, left_out in zip(blocks, drawn):
            skip(block, bool(left_out))

    def on_step_end(self, run: "Run") -> None:
        """Evaluation and checkpoints have all."""
        for _, block in numbered_blocks(run.model):
            skip(block, False)


def skip(block: nn.Module, really: bool) -> None:
    """Let a block pass on its input, or work again."""
    if really:
        block.forward = lambda x, *_, **__: x
    else:
        block.__dict__.pop("forward", None)


def linear_in_budget(
    optimizer: Optimizer,
    max_steps: int,
    *,
    warmup: float,
    floor: float,
    steps: list[int],
    spent: list[float],
) -> LambdaLR:
    """`training.schedules.linear` over a budget of which steps take unequal shares: after
    `steps[i]` of them `spent[i]` of it is gone, linearly in between, and all after `max_steps`.
    `warmup`, in (0, 1), is a fraction of the budget."""

    def gone(step: int) -> float:
        return float(np.interp(step, [0, *steps, max_steps], [0, *spent, 1]))

    def factor(step: int) -> float:
        left = (1 - gone(step)) / (1 - warmup)
        return min(gone(step + 1) / warmup, floor + (1 - floor) * left)

    return LambdaLR(optimizer, factor)
