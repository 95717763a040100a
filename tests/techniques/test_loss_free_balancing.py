import pytest
import torch
from torch import nn

from models.moe import MixtureOfExperts
from techniques.callback.loss_free_balancing import LossFreeBalancing, balance
from tests.conformance.runs import fitted


def mixture(**keys) -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(8, nn.GELU, **keys).double()


def tokens(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 8, dtype=torch.float64, generator=generator)


def one_by_one(layer: MixtureOfExperts, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Outputs and loads, token by token."""
    load = [0] * len(layer.experts)
    out = []
    for token in x.reshape(-1, 8):
        scores = torch.sigmoid(layer.router.weight @ token)
        chosen = sorted(range(len(load)), key=lambda i: -(scores[i] + layer.bias[i]).item())
        out.append(sum(scores[i] * layer.experts[i](token) for i in chosen[: layer.top_k]))
        for i in chosen[: layer.top_k]:
            load[i] += 1
    return torch.stack(out).view_as(x), load


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_mixture_token_by_token(top_k):
    layer, x = mixture(experts=5, top_k=top_k), tokens(3, 7)
    layer.bias.copy_(torch.tensor([0.0, 0.2, -0.1, 0.05, -0.3]))
    out = layer(x)
    expected, load = one_by_one(layer, x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-8)  # gates are float32
    assert layer.load.tolist() == load
    assert sum(load) == 21 * top_k


def test_bias_selects_but_does_not_weigh():
    """A bias that chooses the same experts changes nothing."""
    layer, x = mixture(experts=4, top_k=4), tokens(5)
    before = layer(x)
    layer.bias.copy_(torch.tensor([10.0, -10.0, 3.0, 0.0]))
    torch.testing.assert_close(layer(x), before)
    layer.top_k = 1
    layer.load = None
    layer(x)
    assert layer.load.tolist() == [5, 0, 0, 0]


def test_evaluation_is_not_counted():
    layer = mixture().eval()
    layer(tokens(5))
    assert layer.load is None


def test_experts_without_tokens_have_gradients_of_zero():
    layer = mixture(experts=4, top_k=1)
    layer.bias.copy_(torch.tensor([10.0, 0.0, 0.0, 0.0]))
    layer(tokens(5)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert not layer.experts[1].up.weight.grad.any()


def test_update_by_hand():
    """Mean load 4: fewer raises, more lowers, equal stays."""
    bias = torch.tensor([0.1, 0.0, 0.0, -0.2])
    balance(bias, torch.tensor([9.0, 4.0, 0.0, 3.0]), rate=0.001)
    torch.testing.assert_close(bias, torch.tensor([0.099, 0.0, 0.001, -0.199]))


def test_loads_become_equal():
    """From a router that sends nearly everything to one expert."""
    layer, x = mixture(experts=4, top_k=1), tokens(2000)
    with torch.no_grad():
        layer.router.weight.mul_(0.3)
    layer.bias.copy_(torch.tensor([0.5, 0.0, 0.0, 0.0]))
    violations = []
    for _ in range(300):
        layer.load = None
        with torch.no_grad():
            layer(x)
        load = layer.load.double()
        violations.append((load.max() / load.mean() - 1).item())
        balance(layer.bias, load, rate=0.005)
    assert violations[0] > 2
    assert violations[-1] < 0.1


def test_run_moves_biases_by_the_rate(tmp_path):
    run, _ = fitted("loss_free_balancing", tmp_path, "trainer.max_steps=2")
    layers = [m for m in run.model.modules() if isinstance(m, MixtureOfExperts)]
    steps = torch.stack([layer.bias for layer in layers]) / 0.001
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert 0 < steps.abs().max() <= 2
    assert all(layer.load is None for layer in layers)


def test_loads_are_those_of_the_whole_step(tmp_path):
    """One step in four micro-batches moves the biases as in one."""
    biases = []
    for accumulate in (1, 4):
        extra = ("trainer.max_steps=1", f"trainer.accumulate={accumulate}")
        run, _ = fitted("loss_free_balancing", tmp_path / str(accumulate), *extra)
        layers = [m for m in run.model.modules() if isinstance(m, MixtureOfExperts)]
        biases.append(torch.stack([layer.bias for layer in layers]))
    assert biases[0].equal(biases[1])


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="top_k"):
        MixtureOfExperts(8, nn.GELU, experts=4, top_k=5)
    with pytest.raises(ValueError, match="rate"):
        LossFreeBalancing(rate=0.0)
    with pytest.raises(ValueError, match="every"):
        LossFreeBalancing(every=0)
    run, _ = fitted("golu", tmp_path, "trainer.max_steps=1")
    with pytest.raises(ValueError, match="no mixture of experts"):
        LossFreeBalancing().on_fit_start(run)
