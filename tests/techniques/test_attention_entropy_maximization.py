import math

import pytest
import torch
from scipy.stats import entropy
from torch import nn

from models.abmil import GatedAttention
from techniques.attention.entropy_guided_attention import EntropyGuidedAttention
from techniques.penalty.attention_entropy_maximization import attention_entropy_maximization
from training.assemble import assemble
from training.compose import compose


def penalty_of(model, *inputs):
    model(*inputs)
    return attention_entropy_maximization(model, {}, {})


def bags(batch=4, size=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, size, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 3])
def test_is_the_mean_negative_entropy_of_the_weights(heads):
    """The authors' Σ softmax·log softmax of one bag, averaged over heads and over bags."""
    torch.manual_seed(0)
    model = GatedAttention(5, 7, heads).double()
    weights = model(bags()).detach().numpy()
    expected = -entropy(weights, axis=-1).mean()
    assert penalty_of(model, bags()).item() == pytest.approx(expected, abs=1e-10)


def test_gradients():
    torch.manual_seed(0)
    model = GatedAttention(5, 7, 2).double()
    mask = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    )
    assert torch.autograd.gradcheck(lambda x: penalty_of(model, x, mask), bags().requires_grad_())


class Scores(nn.Module):
    """Keeps the entropy of the softmax of what it is given."""

    def forward(self, scores):
        logs = scores.log_softmax(-1)
        self.entropy = -(logs.exp() * logs).sum(-1)


def test_gradient_of_a_score_is_its_weights_surprise_beyond_the_mean():
    """∂/∂zₙ of Σ a·log a is aₙ·(log aₙ + H): it moves weight from the large to the small."""
    scores = 3 * bags(1, 6)[:, None, :, 0]
    scores.requires_grad_()
    penalty_of(Scores(), scores).backward()
    a = scores.detach().softmax(-1)
    spread = entropy(a[0, 0].numpy())
    torch.testing.assert_close(scores.grad, a * (a.log() + spread), rtol=1e-10, atol=1e-12)


def test_range_and_saturation():
    uniform = penalty_of(Scores(), torch.zeros(2, 1, 6, dtype=torch.float64))
    assert uniform.item() == pytest.approx(-math.log(6), abs=1e-12)
    scores = (1e4 * bags(3, 6)[:, None, :, 0].float().sign()).requires_grad_()
    value = penalty_of(Scores(), scores)
    value.backward()
    assert -math.log(6) <= value <= 0
    assert scores.grad.isfinite().all()
    one = torch.tensor([[[1e4, -1e4, -1e4]]], requires_grad=True)
    value = penalty_of(Scores(), one)
    value.backward()
    assert value == 0
    assert (one.grad == 0).all()


def test_of_a_transformer_it_is_the_mean_over_layers():
    torch.manual_seed(0)
    layers = nn.Sequential(*(EntropyGuidedAttention(16, 4, n, causal=False) for n in range(2)))
    x = torch.randn(2, 5, 16)
    value = penalty_of(layers, x)
    entropies = []
    for layer in layers:
        q, k, _ = layer.project(x)
        scores = q @ k.mT / 2 / layer.temperature.view(-1, 1, 1)
        entropies.append(entropy(scores.softmax(-1).detach().numpy(), axis=-1).mean())
        x = layer(x)
    assert value.item() == pytest.approx(-sum(entropies) / 2, rel=1e-5)
    value.backward()
    assert layers[0].qkv.weight.grad.abs().sum() > 0


def test_composes_and_micro_batches_add_up():
    overrides = ["technique=attention_entropy_maximization", "task=bags", "model.width=8"]
    overrides += ["model.heads=2", "tracker=none", "trainer.batch_size=5", "trainer.device=cpu"]
    name = "attention_entropy_maximization"
    run = assemble(compose([*overrides, f"penalties.{name}.coefficient=0.3"]))
    losses = run.objective(run.batches.part(0, 0))
    total = losses.parts["loss"] + 0.3 * losses.parts[name]
    torch.testing.assert_close(losses.total, total)
    halves = assemble(compose([*overrides, "trainer.accumulate=2"]))
    parts = [(batch["share"], halves.objective(batch).parts[name]) for batch in halves.batches[0]]
    summed = sum(share * value for share, value in parts)
    torch.testing.assert_close(summed, losses.parts[name])


def test_refuses_a_model_without_attention():
    with pytest.raises(ValueError, match="keeps the entropy"):
        attention_entropy_maximization(nn.Linear(2, 2), {}, {})
