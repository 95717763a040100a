import pytest
import torch
import torch.nn.functional as F

from techniques.loss.poly1_loss import Poly1Loss


def batch_of(shape: tuple[int, ...], classes: int = 7) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, classes, generator=generator)
    labels = torch.randint(classes, shape, generator=generator)
    return {"logits": logits}, {"labels": labels}


@pytest.mark.parametrize("epsilon", [-1.0, -0.5, 2.0])
def test_is_the_polynomial_series_with_its_first_coefficient_changed(epsilon):
    """Against Σⱼ αⱼ·(1 − p)ʲ, α₁ = 1 + ε and αⱼ = 1/j, in float64."""
    outputs, batch = batch_of((64,), classes=3)
    p = outputs["logits"].double().softmax(-1).gather(-1, batch["labels"][:, None]).squeeze(-1)
    j = torch.arange(1, 20_001, dtype=torch.float64)
    series = ((1 - p)[:, None] ** j / j).sum(-1) + epsilon * (1 - p)
    losses = Poly1Loss(epsilon)(outputs, batch)
    torch.testing.assert_close(losses.double(), series, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("epsilon", "expected"), [(2, 0.1555), (1, 0.1125), (-1, 0.0264), (0, 0.0695)]
)
def test_closed_form_at_two_classes(epsilon, expected):
    """p = sigmoid(z), by hand for z = 2.631: −log p = 0.0695, 1 − p = 0.0671·(…)."""
    z = 2.631
    p = 1 / (1 + 2.718281828459045**-z)
    assert -torch.tensor(p).log().item() + epsilon * (1 - p) == pytest.approx(expected, abs=2e-2)
    outputs = {"logits": torch.tensor([[z, 0.0]])}
    loss = Poly1Loss(epsilon)(outputs, {"labels": torch.tensor([0])})
    assert loss.item() == pytest.approx(-torch.tensor(p).log().item() + epsilon * (1 - p), rel=1e-5)
