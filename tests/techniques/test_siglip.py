import math

import pytest
import torch
import torch.nn.functional as F

from techniques.loss.siglip import SigLIP
from training.compose import compose


def draw(count=9, dim=5):
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(count, dim, generator=generator) for _ in range(2))
    return image, text


def by_pairs(x, y, temperature, bias):
    """The paper's algorithm 1, one pair at a time, in float64: the sum over each row."""
    x, y = (F.normalize(v.double(), dim=1) for v in (x, y))
    losses = []
    for i in range(len(x)):
        terms = []
        for j in range(len(y)):
            sign = 1 if i == j else -1
            logit = sign * (temperature * (x[i] @ y[j]).item() + bias)
            terms.append(math.log1p(math.exp(-logit)))
        losses.append(sum(terms))
    return torch.tensor(losses)


@pytest.mark.parametrize(("temperature", "bias"), [(10.0, -10.0), (3.0, 0.5)])
def test_is_the_papers_algorithm(temperature, bias):
    image, text = draw()
    loss = SigLIP(temperature, bias)
    losses = loss({"image_embeds": image, "text_embeds": text}, {})
    torch.testing.assert_close(losses, by_pairs(image, text, temperature, bias).float())


def test_temperature_and_bias_learn():
    """Their gradients against central differences."""
    image, text = draw()
    outputs = {"image_embeds": image.double(), "text_embeds": text.double()}
    loss = SigLIP(10.0, -10.0).double()
    loss(outputs, {}).mean().backward()
    for parameter in (loss.log_temperature, loss.bias):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step
                values.append(loss(outputs, {}).mean().item())
                parameter -= step
        assert parameter.grad.item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_of_two_views_each_view_is_a_sample_that_leaves_out_itself():
    first, second = draw(4)
    views = torch.cat([first, second])
    losses = SigLIP(2.0, -1.0)({"logits": views}, {})
    logits = 2.0 * F.normalize(views, dim=1) @ F.normalize(views, dim=1).T - 1.0
    for i in range(8):
        partner = (i + 4) % 8
        negatives = [j for j in range(8) if j not in (i, partner)]
        expected = F.softplus(-logits[i, partner]) + F.softplus(logits[i, negatives]).sum()
        torch.testing.assert_close(losses[i], expected)


def test_overlay_starts_where_the_paper_does():
    loss = compose(["task=pairs", "technique=siglip"])["task"]["loss"]
    assert (loss["temperature"], loss["bias"]) == (10.0, -10.0)


def test_refuses_a_temperature_that_is_not_positive():
    with pytest.raises(ValueError, match="temperature"):
        SigLIP(0.0)
