"""Layer-sequential unit-variance initialisation."""

from typing import Any

import torch
from torch import Tensor, nn

from training.objective import predict


@torch.no_grad()
def lsuv(
    model: nn.Module, batch: dict[str, Any], *, tolerance: float = 0.1, trials: int = 10
) -> None:
    """Make every linear and convolutional layer orthonormal, then, in the order in which they run,
    divide each one's weight by its output's standard deviation on the batch until the variance is
    1 within `tolerance`. Biases start at 0.

    Args:
        model: changed in place.
        batch: a training batch on the model's device; larger is better.
        tolerance: of the variance; 0.1 as in the paper.
        trials: most divisions of a layer; 10.

    Raises:
        ValueError: for a tolerance or a number of trials that is not positive, or a model without
            such layers.

    A layer whose output is constant is left orthonormal.

    Source: "All you need is a good init", arXiv 1511.06422; https://github.com/ducha-aiki/LSUVinit,
    `tools/extra/lsuv_init.py` (which uses 0.02 and 20).
    """
    if tolerance <= 0:
        raise ValueError(f"tolerance: must be positive, got {tolerance}")
    if trials < 1:
        raise ValueError(f"trials: must be at least 1, got {trials}")
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    if not layers:
        raise ValueError("the model has no linear or convolutional layer")

    def scale(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for _ in range(trials if output.numel() > 1 else 0):  # an expert may get no token
            variance = output.float().var()
            if variance == 0 or (variance - 1).abs() < tolerance:
                break
            layer.weight.div_(variance.sqrt())  # type: ignore[operator]
            output = layer.forward(*inputs)
        return output

    for layer in layers:
        nn.init.orthogonal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    # Each hook corrects its layer before the next one runs, so one pass does all in order.
    handles = [layer.register_forward_hook(scale) for layer in layers]
    try:
        outputs = predict(model, batch)
        if "hidden" in outputs:
            outputs["logits"]  # made on first use: the classifier runs now
    finally:
        for handle in handles:
            handle.remove()
