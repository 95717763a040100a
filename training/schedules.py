"""Learning-rate schedules: factories `(optimizer, max_steps, ...) -> LRScheduler`.

Each gives a factor on every group's learning rate, a function of the step alone. `warmup` is in
steps, or as a fraction of `max_steps` when below 1: the factor rises linearly and reaches 1 at
its end.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def constant(optimizer: Optimizer, max_steps: int, *, warmup: float = 0.0) -> LambdaLR:
    """Warm-up, then the learning rate as it is."""
    return _schedule(optimizer, max_steps, warmup, lambda progress: 1.0)


def linear(
    optimizer: Optimizer, max_steps: int, *, warmup: float = 0.0, floor: float = 0.0
) -> LambdaLR:
    """Warm-up, then straight down to `floor` times the learning rate at the last step."""
    return _schedule(optimizer, max_steps, warmup, lambda p: 1 - (1 - floor) * p, floor)


def cosine(
    optimizer: Optimizer, max_steps: int, *, warmup: float = 0.0, floor: float = 0.0
) -> LambdaLR:
    """Warm-up, then half a cosine down to `floor` (SGDR without restarts, arXiv 1608.03983)."""

    def factor(progress: float) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return _schedule(optimizer, max_steps, warmup, factor, floor)


def wsd(
    optimizer: Optimizer,
    max_steps: int,
    *,
    warmup: float = 0.0,
    decay: float = 0.2,
    floor: float = 0.0,
) -> LambdaLR:
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): linear to `floor` over the last part.

    `decay` is that part's length, in steps or as a fraction of `max_steps` when below 1.

    Raises:
        ValueError: when warm-up and decay together are longer than the run.
    """
    start, length = _steps(warmup, max_steps, "warmup"), _steps(decay, max_steps, "decay")
    if start + length > max_steps:
        raise ValueError(f"decay: {length} steps after {start} of warm-up exceed {max_steps}")

    def factor(progress: float) -> float:
        left = (1 - progress) * (max_steps - start)
        return floor + (1 - floor) * min(left / max(length, 1), 1.0)

    return _schedule(optimizer, max_steps, warmup, factor, floor)


def _schedule(
    optimizer: Optimizer,
    max_steps: int,
    warmup: float,
    factor: Callable[[float], float],
    floor: float = 0.0,
) -> LambdaLR:
    """`factor(progress)`, with progress from 0 after the warm-up to 1 at `max_steps`."""
    if not 0 <= floor <= 1:
        raise ValueError(f"floor: must be between 0 and 1, got {floor}")
    start = _steps(warmup, max_steps, "warmup")

    def at(step: int) -> float:
        if step < start:
            return (step + 1) / start
        return factor(min((step - start) / max(max_steps - start, 1), 1.0))

    return LambdaLR(optimizer, at)


def _steps(amount: float, max_steps: int, name: str) -> int:
    if amount < 0:
        raise ValueError(f"{name}: must not be negative, got {amount}")
    return round(amount * max_steps) if amount < 1 else int(amount)
