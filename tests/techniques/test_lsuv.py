import pytest
import torch
from torch import nn

from techniques.init.lsuv import lsuv


class Net(nn.Module):
    """Deep and, as PyTorch starts it, with vanishing variance."""

    def __init__(self, depth=12):
        super().__init__()
        layers = [m for _ in range(depth) for m in (nn.Linear(64, 64), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(64, 10))

    def forward(self, features):
        return {"logits": self.layers(features)}


def variances(model, features):
    found = []
    for layer in model.layers:
        features = layer(features)
        if isinstance(layer, nn.Linear):
            found.append(features.var().item())
    return found


def test_every_layer_has_unit_variance():
    torch.manual_seed(0)
    model, features = Net(), torch.randn(512, 64)
    assert variances(model, features)[-2] < 0.1
    lsuv(model, {"features": features})
    assert all(abs(v - 1) < 0.1 for v in variances(model, features))


def test_weights_stay_orthogonal_up_to_scale():
    torch.manual_seed(0)
    model = Net(2)
    lsuv(model, {"features": torch.randn(64, 64)})
    weight = model.layers[2].weight.detach()
    product = weight @ weight.T
    torch.testing.assert_close(product / product[0, 0], torch.eye(64), atol=1e-4, rtol=0)
    assert model.layers[0].bias.abs().max() == 0


def test_convolutions():
    torch.manual_seed(0)
    model = Net(1)
    model.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    images = 5 * torch.randn(16, 3, 9, 9)
    lsuv(model, {"features": images}, tolerance=1e-3)
    assert model.layers(images).var().item() == pytest.approx(1, abs=1e-3)


def test_refusals():
    with pytest.raises(ValueError, match="tolerance"):
        lsuv(Net(), {}, tolerance=0)
    with pytest.raises(ValueError, match="trials"):
        lsuv(Net(), {}, trials=0)
    with pytest.raises(ValueError, match="no linear"):
        lsuv(nn.ReLU(), {})
