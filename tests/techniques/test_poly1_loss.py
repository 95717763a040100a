import pytest
import torch
import torch.nn.functional as F

from models.outputs import Outputs
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
    ("epsilon", "expected"), [(2.0, 4.5317), (1.0, 3.7153), (0.0, 2.8990), (-1.0, 2.0827)]
)
def test_published_values(epsilon, expected):
    """From optax's test of `poly_loss_cross_entropy`: values of the paper's TensorFlow code.

    The labels there are soft; the loss is linear in them, so it is the average over hard labels.
    """
    logits = torch.tensor([0.14, 1.456, 2.356, -0.124, -2.47]).expand(5, 5)
    losses = Poly1Loss(epsilon)({"logits": logits}, {"labels": torch.arange(5)})
    average = losses @ torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3])
    assert average.item() == pytest.approx(expected, abs=1e-4)


def test_epsilon_zero_is_cross_entropy_and_ignored_labels_have_no_loss():
    outputs, batch = batch_of((4, 9))
    batch["labels"][:, ::3] = -100
    logits = outputs["logits"].requires_grad_()
    expected = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    torch.testing.assert_close(Poly1Loss(0.0)(outputs, batch), expected)

    losses = Poly1Loss()(outputs, batch)
    assert losses.shape == batch["labels"].shape
    assert (losses[:, ::3] == 0).all()
    losses.sum().backward()
    assert (logits.grad[:, ::3] == 0).all()


def test_gradient_is_one_plus_epsilon_p_times_that_of_cross_entropy():
    """dL/dz = (1 + ε·p)·(softmax − one-hot): the derivative of −log p + ε·(1 − p)."""
    outputs, batch = batch_of((16,))
    logits = outputs["logits"].requires_grad_()
    Poly1Loss(2.0)(outputs, batch).sum().backward()
    probabilities = logits.detach().softmax(-1)
    p = probabilities.gather(-1, batch["labels"][:, None])
    expected = (1 + 2 * p) * (probabilities - F.one_hot(batch["labels"], 7))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-6)


def test_refuses_a_negative_leading_coefficient():
    with pytest.raises(ValueError, match="epsilon"):
        Poly1Loss(-1.5)


def test_of_a_language_model_it_is_fused():
    """Values and gradients from hidden states as from logits, which are never made."""
    torch.manual_seed(0)
    classifier = torch.nn.Linear(5, 9).double()
    hidden = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 8, -100, 3], [1, 2, 4, -100]])
    outputs = Outputs(hidden=hidden, classifier=classifier)
    losses = Poly1Loss(1.5)(outputs, {"labels": labels})
    assert "logits" not in outputs
    plain = Poly1Loss(1.5)({"logits": classifier(hidden)}, {"labels": labels})
    torch.testing.assert_close(losses, plain, rtol=0, atol=1e-12)
    leaves = [hidden, classifier.weight, classifier.bias]
    torch.testing.assert_close(
        torch.autograd.grad(losses.sum(), leaves), torch.autograd.grad(plain.sum(), leaves)
    )
