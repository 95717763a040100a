import numpy as np
import pytest
import torch
from torch import nn

from techniques.gradient import parts
from tests.techniques.gradients import microbatches
from tests.techniques.several_losses import Point, Scaled, flat, gradients, objective
from training.objective import Objective, backprop


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("backward", [torch.Tensor.backward, Scaled()])
def test_each_part_with_its_coefficient(count, backward):
    model = Point()
    losses, found = parts.part_gradients(objective(model), model, microbatches(count), backward)
    assert list(found) == ["loss", "first", "second"]
    for gradient, expected in zip(found.values(), gradients()):
        np.testing.assert_allclose(torch.cat([g.flatten() for g in gradient]), expected, atol=1e-12)
    values = [model.height(part).item() for part in range(3)]
    assert [v.item() for v in losses.parts.values()] == pytest.approx(values, rel=1e-12)
    assert losses.total.item() == pytest.approx(values[0] + 0.5 * values[1] + 2 * values[2])
    np.testing.assert_allclose(parts.products(list(found.values())), gradients() @ gradients().T)
    total = parts.combine([1.0, 1.0, 1.0], list(found.values()))
    parts.put(total, objective(model), backward)
    scale = getattr(backward, "scale", 1.0)
    np.testing.assert_allclose(flat(model)[1], scale * gradients().sum(0), atol=1e-9)


class Noisy(nn.Module):
    """Dropout and batch statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1)
        )

    def forward(self, features):
        return {"logits": self.layers(features)}


def noisy(model):
    return Objective(
        model,
        lambda outputs, batch: outputs["logits"].square(),
        lambda losses, outputs, batch: losses.mean(),
        {
            "absolute": (lambda model, outputs, batch: outputs["logits"].abs().mean(), 3.0),
            "weights": (lambda model, outputs, batch: model.layers[0].weight.norm(), 0.1),
        },
        frozenset({"features"}),
    )


def test_they_add_up_to_backpropagation_where_forwards_are_random():
    torch.manual_seed(0)
    model, other = Noisy().double(), Noisy().double()
    other.load_state_dict(model.state_dict())
    features = torch.randn(16, 4, dtype=torch.float64)
    batches = [{"features": f, "share": torch.tensor(0.5)} for f in features.chunk(2)]
    torch.manual_seed(1)
    losses, found = parts.part_gradients(noisy(model), model, batches, torch.Tensor.backward)
    after = torch.rand(1)
    torch.manual_seed(1)
    expected = backprop(noisy(other), other, batches, torch.Tensor.backward)
    assert after.equal(torch.rand(1))
    torch.testing.assert_close(losses.total, expected.total)
    for value, parameter in zip(parts.combine([1.0] * 3, list(found.values())), other.parameters()):
        torch.testing.assert_close(value, parameter.grad)
    for buffer, wanted in zip(model.buffers(), other.buffers()):
        assert buffer.equal(wanted)


def test_a_single_loss_is_refused():
    model = Point()
    with pytest.raises(ValueError, match="no penalty"):
        parts.part_gradients(
            objective(model, several=False), model, microbatches(), torch.Tensor.backward
        )
