"""What an optimizer's step goes through."""

from typing import Any

from torch import Tensor


def with_gradients(groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
    """Group, weight and gradient of every parameter that has one."""
    return [(g, p, p.grad) for g in groups for p in g["params"] if p.grad is not None]
