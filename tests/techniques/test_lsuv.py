from itertools import pairwise

import pytest
import torch
from torch import nn

from models.outputs import Outputs
from techniques.init.lsuv import lsuv


class Deep(nn.Module):
    """Linear layers with ReLU between, and no norm."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
            x = x.relu()
        return found

    def forward(self, features: torch.Tensor) -> Outputs:
        return Outputs(logits=self.outputs(features)[-1])


def batch(rows: int = 512) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"features": 5 * torch.randn(rows, 32, generator=generator) + 1}


def deep(sizes: list[int]) -> Deep:
    torch.manual_seed(0)
    return Deep(sizes)


def variances(model: Deep) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([out.var() for out in model.outputs(batch()["features"])])


def test_every_layer_has_unit_variance():
    model = deep([32] + 20 * [48] + [10])
    assert variances(model)[-1] < 0.1  # the default fades
    lsuv(model, batch())
    assert (variances(model) - 1).abs().max() < 0.1
    assert not any(layer.bias.any() for layer in model.layers)


def test_a_smaller_tolerance_is_kept():
    model = deep([32, 48, 48, 10])
    lsuv(model, batch(), tolerance=1e-4)
    assert (variances(model) - 1).abs().max() < 1e-4


def test_weights_are_orthonormal_but_for_their_scale():
    model = deep([32, 64, 16])
    lsuv(model, batch())
    for layer in model.layers:
        weight = layer.weight.detach().double()
        gram = weight.T @ weight if len(weight) > weight.shape[1] else weight @ weight.T
        scale = gram.diagonal().mean()
        torch.testing.assert_close(gram / scale, torch.eye(len(gram)).double(), rtol=0, atol=1e-5)


def test_one_division_suffices_without_a_bias():
    """A linear layer's variance is quadratic in the scale of its weight."""
    once, often = deep([32, 48, 10]), deep([32, 48, 10])
    torch.manual_seed(2)
    lsuv(once, batch(), trials=1)
    torch.manual_seed(2)
    lsuv(often, batch(), trials=10)
    for first, second in zip(once.layers, often.layers):
        torch.testing.assert_close(first.weight, second.weight)


def test_convolutions_and_the_classifier_behind_hidden_states():
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 8, 3)
            self.head = nn.Linear(8, 5)

        def forward(self, pixel_values: torch.Tensor) -> Outputs:
            hidden = self.convolution(pixel_values).relu().mean((2, 3))
            return Outputs(hidden=hidden, classifier=self.head)

    torch.manual_seed(0)
    model = Images()
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    lsuv(model, {"pixel_values": images, "labels": torch.zeros(64)})
    with torch.no_grad():
        assert model.convolution(images).var().item() == pytest.approx(1, abs=0.1)
        assert model(images)["logits"].var().item() == pytest.approx(1, abs=0.1)


def test_constant_output_leaves_the_layer_orthonormal():
    model = deep([32, 16])
    lsuv(model, {"features": torch.zeros(8, 32)})
    weight = model.layers[0].weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("tolerance", 0.0), ("trials", 0)])
def test_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        lsuv(deep([32, 4]), batch(), **{name: value})


def test_refuses_a_model_without_layers():
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        lsuv(nn.LayerNorm(4), {})
