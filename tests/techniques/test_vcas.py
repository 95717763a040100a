import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from study.probes.estimator import measure as measure_estimator
from techniques.callback import vcas as callback
from techniques.callback.probing import exact
from techniques.reparam import vcas as reparam
from techniques.reparam.vcas import SampledLinear, Sampler, keep_probabilities
from training.assemble import assemble
from training.compose import compose
from training.data import move

SMALL = (
    *("technique=vcas", "tracker=none", "trainer.device=cpu", "task=digits", "model=vit"),
    *("model.width=8", "model.depth=2", "model.heads=2", "trainer.batch_size=8"),
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assembled(*extra):
    """A run about to take its first step."""
    run = assemble(compose([*SMALL, *extra]))
    run.microbatches = [move(batch, run.device) for batch in run.batches[0]]
    run.objective.train()
    run.callbacks["vcas"].on_fit_start(run)
    return run


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_probabilities_by_bisection(ratio):
    scores = np.random.default_rng(0).lognormal(0, 2, 50)
    found = keep_probabilities(torch.from_numpy(scores), ratio).numpy()
    c = brentq(lambda c: np.minimum(1, c * scores).sum() - int(50 * ratio), 0, 1e9, xtol=1e-14)
    np.testing.assert_allclose(found, np.minimum(1, c * scores), rtol=1e-8)


def test_probabilities_at_the_ends():
    scores = torch.tensor([0.0, 3.0, 0.0, 1.0])
    assert keep_probabilities(scores, 0.75).tolist() == [0, 1, 0, 1]
    assert keep_probabilities(scores, 1.0).tolist() == [1, 1, 1, 1]
    assert keep_probabilities(scores, 0.01).tolist() == [0, 0.75, 0, 0.25]  # one row at least
    assert keep_probabilities(torch.zeros(3), 0.5).tolist() == [0, 0, 0]


def linear(ratio):
    layer = SampledLinear(nn.Linear(4, 3, dtype=torch.float64))
    layer.ratio = ratio
    return layer


def rows():
    """Inputs and gradients of 6 samples, 5 rows each, the second sample's gradient being 0."""
    x, grad = torch.randn(6, 5, 4).double().exp(), torch.randn(6, 5, 3).double().exp()
    grad[1] = 0
    return x.requires_grad_(), grad


def test_linear_layer():
    """Its weight's gradient is unbiased, with the variance that is told; the others are exact."""
    layer, (x, grad) = linear(0.4), rows()
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    expected = torch.autograd.grad(plain, [x, *layer.parameters()], grad)
    draws = []
    for _ in range(2000):
        for_x, for_weight, for_bias = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
        draws.append(for_weight)
    torch.testing.assert_close(for_x, expected[0])
    torch.testing.assert_close(for_bias, expected[2])
    found = torch.stack(draws)
    assert ((found.mean(0) - expected[1]).abs() < 5 * found.std(0) / 2000**0.5).all()

    layer.variance = 0.0
    told = torch.autograd.grad(layer(x), list(layer.parameters()), grad)[0]
    torch.testing.assert_close(told, expected[1])
    assert found.var(0).sum().item() == pytest.approx(layer.variance, rel=0.1)
    scores = (grad.norm(dim=-1) * x.detach().norm(dim=-1))[[0, 2, 3, 4, 5]].flatten().numpy()
    c = brentq(lambda c: np.minimum(1, c * scores).sum() - 10, 0, 1e9, xtol=1e-14)
    closed = (scores**2 * (1 / np.minimum(1, c * scores) - 1)).sum()
    assert layer.variance == pytest.approx(closed, rel=1e-5)


def test_sampler():
    """Gᵢ/pᵢ with probability pᵢ, else 0."""
    sampler, x, grad = Sampler(), torch.zeros(6, 5, requires_grad=True), torch.randn(6, 5).exp()
    grad[1] = 0
    sampler.ratio = 0.5
    p = keep_probabilities(grad.norm(dim=1), 0.5)
    draws = torch.stack([torch.autograd.grad(sampler(x), x, grad)[0] for _ in range(2000)])
    kept = draws.any(2)
    torch.testing.assert_close(kept.float().mean(0), p, rtol=0, atol=5 * 0.5 / 2000**0.5)
    for draw, own in zip(draws[:20], kept):
        torch.testing.assert_close(draw[own], (grad / p[:, None])[own], rtol=1e-5, atol=0)


def test_products_are_smaller():
    """Of 6 samples one has no gradient: products with 25 rows, and with 10 for the weight."""
    layer, (x, grad) = linear(1.0), rows()
    flops = 2 * 4 * 3
    with FlopCounterMode(display=False) as counter:
        layer(x).backward(grad)
    assert counter.get_total_flops() == flops * (30 + 25 + 25)
    layer.ratio = 0.4
    totals = []
    for _ in range(200):
        with FlopCounterMode(display=False) as counter:
            layer(x).backward(grad)
        totals.append(counter.get_total_flops())
    assert np.mean(totals) == pytest.approx(flops * (30 + 25 + 10), rel=0.02)


def test_run_is_unbiased():
    """The whole gradient of a model whose blocks and layers sample: its bias is its noise."""
    run = assembled()
    gradient = run.callbacks["vcas"]
    gradient.kept, gradient.rows = [0.5, 0.75], [0.5] * len(gradient.rows)
    gradient._tell(run)
    found = measure_estimator(run, draws=60)
    assert found["estimator/variance"] > 1e-3
    assert found["estimator/bias"] < 2 * found["estimator/bias_error"]


def test_measured_variances():
    """V against NumPy's; V_act against draws with samples alone."""
    run = assembled()
    own = run.callbacks["vcas"]
    own.kept = [0.5, 0.75]
    own._tell(run)
    layers = reparam.sampled_linears(run.model)

    batches = [[move(part, run.device) for part in run.batches[number]] for number in (0, 1)]

    def gradient(number):
        batch, weights = batches[number], [layer.weight for layer in layers]
        total = sum(run.objective(part).total * part["share"] for part in batch)
        return [g.double().numpy() for g in torch.autograd.grad(total, weights)]

    with exact(run.model):
        first, second = gradient(0), gradient(1)
    found = callback.measure(run, 2, (0.9,))
    expected = [np.var([a, b], axis=0, ddof=1).sum() for a, b in zip(first, second)]
    np.testing.assert_allclose(found.batch, expected, rtol=1e-4)
    assert sum(found.weight) == 0  # every row is kept
    many = [callback.measure(run, 2, (0.9,)).activation for _ in range(12)]
    drawn = [
        sum(((a - b) ** 2).sum() for a, b in zip(gradient(number), reference))
        for number, reference in ((0, first), (1, second))
        for _ in range(30)
    ]
    error = (np.var(many) / 12 + np.var(drawn) / 60) ** 0.5
    assert abs(np.mean(many) - np.mean(drawn)) < 4 * error


def test_blocks_that_return_a_tuple():
    """As some of transformers' do: the hidden states are sampled."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(x), "more"

    model = nn.Module()
    model.blocks = nn.ModuleList([Block()])
    reparam.vcas(model)
    reparam.samplers(model)[0].ratio = 0.25
    states, more = model.blocks[0](torch.randn(4, 3))
    assert more == "more"
    assert type(states.grad_fn).__name__ == "_SampleBackward"


def test_share_of_samples():
    norms = torch.tensor([1.0, 4.0, 2.0, 3.0])
    assert callback.share_of_samples(norms, 0.35) == 0.25
    assert callback.share_of_samples(norms, 0.65) == 0.5
    assert callback.share_of_samples(norms, 0.75) == 0.75
    assert callback.share_of_samples(norms, 1.01) == 1.0


@pytest.mark.parametrize(
    ("activation", "s", "kept"),
    [(0.02, 0.49, [0.6 + 0.4 * 0.5, 0.6 + 0.4 * 0.5]), (0.06, 0.51, [0.6 + 0.4 * 0.3, 1.0])],
)
def test_adaptation(activation, s, kept):
    """Of τ = 0.025 and V = 2: V_act up to 0.05 lowers s. The lower block's share of samples is at
    most the upper one's."""
    own = callback.VCAS()
    own.s, own.kept, own.rows = 0.5, [1.0, 1.0], [0.5, 0.5]
    own._adapt(callback.Measured([1.0, 1.0], activation, [0.02, 0.03], [[0.3, 1.0], [0.5, 0.4]]))
    assert own.s == pytest.approx(s)
    assert own.kept == pytest.approx(kept)
    assert own.rows == pytest.approx([0.5 * 0.95, 0.5 / 0.95])


def test_blocks_with_the_ratio_above_sample_no_further():
    run = assembled()
    own = run.callbacks["vcas"]
    own.kept = [0.5, 0.5]
    own._tell(run)
    assert [sampler.ratio for sampler in reparam.samplers(run.model)] == [1.0, 0.5]


def test_measuring_leaves_no_trace():
    run = assembled("model.dropout=0.5", "trainer.accumulate=2", "callbacks.vcas.every=1")
    weights = [p.clone() for p in run.objective.parameters()]
    run.callbacks["vcas"].on_batch(run)
    assert all(p.equal(w) and p.grad is None for p, w in zip(run.objective.parameters(), weights))
    assert run.callbacks["vcas"].s == 0.99
    assert run.recorded["vcas/activation_variance"] == 0  # ratios of 1: dropout is no difference
    assert all(layer.ratio == 0.95 for layer in reparam.sampled_linears(run.model))


def test_refusals():
    with pytest.raises(ValueError, match=r"^reparam\.vcas"):
        reparam.vcas(nn.Sequential(nn.Linear(2, 2)))
    for keys in ({"activation_tau": 0.0}, {"step": 0}, {"every": 0}, {"repeats": 1}):
        with pytest.raises(ValueError, match=f"^{next(iter(keys))}"):
            callback.VCAS(**keys)
