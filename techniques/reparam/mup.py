"""Maximal update parametrisation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.errors import nearest


class Multiplied(nn.Module):
    """A weight times a constant.

    Args:
        factor: the constant.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight


def mup(
    model: nn.Module, base_width: int = 64, readout: str = "head", inputs: Sequence[str] = ()
) -> None:
    """Parametrise a model so that the learning rate that is best for Adam at a base width is best
    at every width. With m = width / base_width:

    - hidden weights, whose inputs grow with the width: W = w / m, where w starts √m times as large.
      The initial variance falls as 1/m; as Adam moves w by the learning rate, however small the
      gradient, W moves by the learning rate over m; decoupled decay is as it was;
    - the readout: W = w / m, where w starts as it was;
    - embeddings, norms and biases: as they were.

    A weight's multiplier takes the place of the learning rate of its own that the authors give it,
    which is the same training under Adam when its ε is small. SGD needs another parametrisation.
    Attention keeps q·k/√d, so heads must keep their size and grow in number (`model.heads`), as in
    Mu-scaling: the authors' 1/d is then a constant more. At the base width nothing changes.

    Args:
        model: its linear layers are reparametrised.
        base_width: features at which the learning rate was found; 64 is this repository's choice.
        readout: name of the layer that makes logits; its inputs are the width.
        inputs: names of linear layers whose inputs do not grow with the width, such as the first
            of a perceptron; they are left as they are.

    Raises:
        ValueError: for a base width below 1, or a name that is no linear layer of the model.

    Source: "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
    arXiv 2203.03466; https://github.com/microsoft/mup, `mup/optim.py` (MuAdam), `mup/layer.py`
    (MuReadout) and `mup/init.py`.
    """
    if base_width < 1:
        raise ValueError(f"base_width: must be at least 1, got {base_width}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for argument, name in [("readout", readout), *(("inputs", name) for name in inputs)]:
        if name not in layers:
            hint = nearest(name, layers)
            raise ValueError(f"{argument}: the model has no linear layer '{name}'{hint}")
    wider = layers[readout].in_features / base_width
    for name in [name for name in layers if name not in inputs]:
        if name != readout:
            with torch.no_grad():
                layers[name].weight.mul_(wider**0.5)
        parametrize.register_parametrization(layers[name], "weight", Multiplied(1 / wider))
