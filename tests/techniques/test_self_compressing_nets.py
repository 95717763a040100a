import numpy as np
import pytest
import torch
from torch import nn

from techniques.callback.probing import training_batch
from techniques.penalty.self_compressing_nets import self_compressing_nets as penalty
from techniques.post.hidden import hidden_units
from techniques.post.self_compressing_nets import SelfCompress, grid_of
from techniques.reparam.self_compressing_nets import LearnedBits, self_compressing_nets
from tests.conformance.runs import fitted, tiny
from training import packing
from training.assemble import assemble
from training.errors import UsageError

BITS = np.array([0.0, 0.3, 1.0, 2.0, 2.6, 4.0, 7.5])


@pytest.fixture
def learned():
    """Bits of all sizes over a weight (7, 5, 3), in float64."""
    torch.manual_seed(0)
    weight = torch.randn(7, 5, 3, dtype=torch.float64)
    module = LearnedBits(weight, bits=2, exponent=-1, rate=4.0)
    with torch.no_grad():
        module.bits.copy_(torch.from_numpy(BITS) / 4)
        module.exponent.copy_(torch.linspace(-3, 1, 7, dtype=torch.float64) / 4)
    return module, weight.requires_grad_()


def rounded(weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """The paper's formula: step, what is rounded, bounds."""
    step = (2.0 ** np.linspace(-3, 1, 7))[:, None, None]
    low = (-(2.0 ** (BITS - 1)))[:, None, None]
    high = (2.0 ** (BITS - 1) - 1)[:, None, None]
    return step, np.clip(weight / step, low, high), low, high


def test_values_are_the_formulas(learned):
    module, weight = learned
    step, units, *_ = rounded(weight.detach().numpy())
    np.testing.assert_allclose(module(weight).detach(), step * np.round(units), rtol=1e-12)
    assert module(weight)[0].count_nonzero() == 0
    assert len(module(weight)[2].unique()) == 2  # one bit


def test_gradients_are_those_of_a_derivation(learned):
    """With r = round, u the clipped number: ∂/∂w is 1 inside the bounds; ∂/∂e is ln 2·2^e·(r − u)
    inside and ln 2·2^e·r where clipped; ∂/∂b is ln 2·2^(e + b − 1), with the bound's sign."""
    module, weight = learned
    given = torch.randn(7, 5, 3, dtype=torch.float64)
    (module(weight) * given).sum().backward()
    w, g = weight.detach().numpy(), given.numpy()
    step, units, low, high = rounded(w)
    inside = (w / step > low) & (w / step < high)
    np.testing.assert_allclose(weight.grad, g * inside, rtol=1e-12)
    along = np.log(2) * step * (np.round(units) - np.where(inside, units, 0))
    np.testing.assert_allclose(module.exponent.grad, 4 * (g * along).sum((1, 2)), rtol=1e-10)
    sign = np.where(inside, 0, np.where(w / step >= high, 1, -1))
    bound = np.log(2) * step * 2.0 ** (BITS - 1)[:, None, None] * sign
    expected = 4 * (g * bound).sum((1, 2)) * (BITS > 0)  # at 0 for good
    np.testing.assert_allclose(module.bits.grad, expected, rtol=1e-10)


def test_many_bits_are_the_weight_itself():
    torch.manual_seed(0)
    weight = torch.randn(4, 9, dtype=torch.float64)
    module = LearnedBits(weight, bits=40, exponent=None, rate=1.0)
    torch.testing.assert_close(module(weight), weight, rtol=0, atol=1e-10)


def test_penalty_is_the_mean_number_of_bits():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 5), nn.LayerNorm(5))
    self_compressing_nets(model, bits=2)
    conv, linear = (model[i].parametrizations.weight[0] for i in (0, 1))
    with torch.no_grad():
        conv.bits.copy_(torch.tensor([1.0, -2.0, 4.0]))
        linear.bits.copy_(torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0]))
    value = penalty(model, {}, {})
    assert value.item() == pytest.approx((5 * 18 + 7 * 4) / (54 + 20))
    value.backward()
    assert conv.bits.grad.tolist() == pytest.approx([18 / 74, 0, 18 / 74])


def test_grid_has_the_shortest_codes_of_each_row():
    integers = torch.tensor([[0.0, 0, 0], [-1, 0, 0], [-2, 1, 0], [-3, 2, 1], [3, 1, 2]])
    scale = torch.tensor([[0.3], [0.5], [1.1], [2.0], [0.7]])
    grid = grid_of(scale * integers, scale)
    assert torch.as_tensor(grid.bits).flatten().tolist() == [0, 1, 2, 3, 2]
    assert grid.values(grid.codes(scale * integers)).equal(scale * integers)


def test_compressed_model_computes_what_it_did_and_is_smaller(tmp_path):
    """Channels of 0 bits go, with what they add to the next layer; the file restores the rest."""
    run = assemble(tiny("self_compressing_nets", tmp_path)[0])
    learned = [
        m.parametrizations.weight[0] for h in hidden_units(run.model).values() for m in h.into
    ]
    with torch.no_grad():
        for module in learned:
            module.bits[::4] = -1.0
        for hidden in hidden_units(run.model).values():
            hidden.into[0].bias.normal_()
    batch = training_batch(run, 16)
    with torch.no_grad():
        before = run.objective.predict(batch)["logits"]
        SelfCompress()(run)
        after = run.objective.predict(batch)["logits"]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert [h.size for h in hidden_units(run.model).values()] == [24, 24]
    whole = 64 * 32 + 32 * 32 + 32 * 10
    left = 64 * 24 + 24 * 24 + 24 * 10
    assert run.recorded["post/weights"] == pytest.approx(left / whole)
    assert run.recorded["post/bits"] <= 2 * left / (32 * whole)
    path = tmp_path / "packed.safetensors"
    path.write_bytes(packing.pack(run.model, run.grids))
    found = packing.load(path)
    assert all(found[name].equal(value) for name, value in run.model.state_dict().items())
    assert penalty(run.model, {}, batch).item() == 0  # as fine-tuning has it
    with pytest.raises(UsageError, match="has given no layer learned bits"):
        SelfCompress()(run)


def test_a_strong_penalty_takes_bits_away(tmp_path):
    quick = [f"reparam.self_compressing_nets.{s}" for s in ("exponent=null", "rate=10")]
    strong = ("penalties.self_compressing_nets.coefficient=20", "optimizer.lr=1e-2")
    run, _ = fitted("self_compressing_nets", tmp_path, "trainer.max_steps=40", *quick, *strong)
    assert run.last["post/weights"] < 0.9
    assert run.last["post/self_compressing_nets/bytes"] < 0.2 * run.last["post/bytes"]
    assert run.last["train/self_compressing_nets"] < 1


def test_settings_reach_it(tmp_path):
    settings = [f"reparam.self_compressing_nets.{s}" for s in ("bits=4", "exponent=-3", "rate=2")]
    run = assemble(tiny("self_compressing_nets", tmp_path, *settings)[0])
    learned = run.model.head.parametrizations.weight[0]
    assert learned.depth().tolist() == [4.0] * 10
    assert (learned.rate * learned.exponent).tolist() == [-3.0] * 10
    assert learned.bits[0] == 2


def test_refusals():
    with pytest.raises(ValueError, match="bits: must be above 0, got 0"):
        LearnedBits(torch.ones(2, 2), 0, None, 1.0)
    with pytest.raises(ValueError, match="rate: must be above 0, got -1"):
        LearnedBits(torch.ones(2, 2), 2, None, -1)
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        self_compressing_nets(nn.LayerNorm(3))
