import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models.feedforward import FeedForward, GatedFeedForward
from models.mlp import MLP
from techniques.callback.probing import training_batch
from techniques.post.hidden import Hidden, hidden_units, remove
from techniques.post.layers import inputs
from techniques.post.variance_based_pruning import VarianceBasedPruning, lowest
from tests.conformance.runs import fitted, tiny
from training.assemble import assemble
from training.errors import UsageError

POST = "post.variance_based_pruning"


@pytest.fixture
def run(tmp_path):
    """A run in float64 that has not trained, with biases that are not zero."""
    run = assemble(tiny("variance_based_pruning", tmp_path)[0])
    run.objective.double()
    run.task = Double(run.task)
    torch.manual_seed(0)
    for name, parameter in run.model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return run


class Double:
    """A task whose pixels are float64."""

    def __init__(self, task):
        self.task = task

    def __getattr__(self, name):
        return getattr(self.task, name)

    def prepare(self, *given):
        batch = self.task.prepare(*given)
        return batch | {"pixel_values": batch["pixel_values"].double()}


def values(run, hidden: Hidden, samples: int) -> np.ndarray:
    return inputs(run, {"out": hidden.out}, samples)["out"].numpy()


def test_units_biases_and_weights_are_those_of_a_derivation_in_numpy(run):
    """Welford's two running sums, as the paper states them, the global ranking, and the biases."""
    before = copy.deepcopy(run.model)
    seen = {name: values(run, h, 64) for name, h in hidden_units(run.model).items()}
    VarianceBasedPruning(0.4, samples=64)(run)
    moments = {}
    for name, rows in seen.items():
        mean, second = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
        for count, row in enumerate(rows, 1):
            old, mean = mean, (count - 1) / count * mean + row / count
            second += (row - old) * (row - mean)
        moments[name] = mean, second / (len(rows) - 1)
    ranked = sorted((v, name, j) for name, (_, s) in moments.items() for j, v in enumerate(s))
    gone = {(name, j) for _, name, j in ranked[: round(0.4 * len(ranked))]}
    for name, hidden in hidden_units(run.model).items():
        old = before.get_submodule(name)
        units = range(old.in_features)
        left = [j for j in units if (name, j) not in gone]
        taken = [j for j in units if (name, j) in gone]
        weight = old.weight.detach().numpy()
        bias = old.bias.detach().numpy() + weight[:, taken] @ moments[name][0][taken]
        up = before.get_submodule(name.replace("down", "up"))
        np.testing.assert_array_equal(hidden.out.weight.detach().numpy(), weight[:, left])
        np.testing.assert_allclose(hidden.out.bias.detach().numpy(), bias, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(hidden.into[0].weight.detach(), up.weight.detach()[left])
        np.testing.assert_array_equal(hidden.into[0].bias.detach(), up.bias.detach()[left])


def test_the_mean_output_of_a_layer_stays(run):
    """Over the samples seen, and exactly: Σ over units of W·E[h] + b."""
    first = next(iter(hidden_units(run.model).values()))
    x = values(run, first, 64)
    old = x @ first.out.weight.detach().numpy().T + first.out.bias.detach().numpy()
    VarianceBasedPruning(0.6, samples=64)(run)
    x = values(run, first, 64)
    new = x @ first.out.weight.detach().numpy().T + first.out.bias.detach().numpy()
    assert x.shape[1] < 128
    np.testing.assert_allclose(new.mean(0), old.mean(0), rtol=1e-10)
    assert np.abs(new - old).max() > 1e-3


def test_units_that_do_not_vary_cost_nothing(run):
    """Constant units are the first to go, and the model's outputs are what they were."""
    for hidden in hidden_units(run.model).values():
        with torch.no_grad():
            hidden.into[0].weight[::2] = 0
    batch = training_batch(run, 16)
    with torch.no_grad():
        before = run.objective.predict(batch)["logits"]
        VarianceBasedPruning(0.5, samples=16)(run)
        after = run.objective.predict(batch)["logits"]
    assert [h.size for h in hidden_units(run.model).values()] == [64, 64]
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    assert run.recorded["post/units"] == 0.5


def test_nothing_removed_leaves_the_model_as_it_is(run):
    before = copy.deepcopy(run.model.state_dict())
    VarianceBasedPruning(0.0, samples=8)(run)
    after = run.model.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())
    assert run.recorded == {"post/units": 1.0, "post/macs": 1.0}


def test_lowest_ranks_all_layers_together_and_spares_the_best_of_each():
    scores = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([0.1, 0.3, 0.2])}
    gone = lowest(scores, 0.5)
    assert [mask.tolist() for mask in gone.values()] == [[True, False, False], [True, False, True]]
    everything = lowest(scores, 0.99)
    assert [int((~mask).sum()) for mask in everything.values()] == [1, 1]


@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
def test_removed_units_of_either_feed_forward_are_constants(kind, run):
    """Against the layer with the hidden values overwritten."""
    torch.manual_seed(1)
    ffn = kind(8, nn.GELU).double()
    whole, x = copy.deepcopy(ffn), torch.randn(5, 8, dtype=torch.float64)
    size = ffn.down.in_features
    constant, gone = torch.randn(size, dtype=torch.float64), torch.rand(size) < 0.5
    whole.down.register_forward_pre_hook(lambda _, given: torch.where(gone, constant, given[0]))
    run.model.extra = ffn
    remove(run, {"extra.down": gone}, {"extra.down": constant})
    torch.testing.assert_close(ffn(x), whole(x), rtol=1e-10, atol=1e-10)
    assert ffn.up.out_features == ffn.down.in_features == int((~gone).sum())


def test_layers_of_an_mlp_without_norms_have_hidden_units():
    def mlp(norm, activation=nn.ReLU):
        sizes = {"in_features": 4, "out_features": 3, "width": 6, "depth": 2}
        return MLP(**sizes, activation=activation, norm=norm, head=nn.Linear)

    found = hidden_units(mlp(nn.Identity))
    assert {name: h.size for name, h in found.items()} == {"layers.3": 6, "head": 6}
    with pytest.raises(UsageError, match=r"model\.norm\._target_=torch\.nn\.Identity"):
        hidden_units(mlp(nn.LayerNorm))
    with pytest.raises(UsageError, match="no feed-forward layer"):  # slopes by channel
        hidden_units(mlp(nn.Identity, lambda channels: nn.PReLU(channels)))


def test_composes_and_its_settings_reach_it(tmp_path):
    settings = (f"{POST}.amount=0.25", f"{POST}.by=magnitude", f"{POST}.compensate=false")
    run, _ = fitted("variance_based_pruning", tmp_path, "trainer.max_steps=2", *settings)
    step = run.post["variance_based_pruning"]
    assert (step.amount, step.by, step.compensate) == (0.25, "magnitude", False)
    assert run.last["post/units"] == 0.75
    assert 0.75 < run.last["post/macs"] < 1
    assert run.last["post/variance_based_pruning/bytes"] < run.last["post/bytes"]
    assert "post/variance_based_pruning/val/loss" in run.last


def test_refusals(run):
    with pytest.raises(ValueError, match="amount: must be at least 0 and below 1, got 1"):
        VarianceBasedPruning(1)
    with pytest.raises(ValueError, match="by: one of variance, magnitude, random, got 'size'"):
        VarianceBasedPruning(by="size")
    with pytest.raises(ValueError, match="samples: must be at least 2, got 1"):
        VarianceBasedPruning(samples=1)
    run.model = SimpleNamespace(named_modules=lambda: [])
    with pytest.raises(UsageError, match="no feed-forward layer"):
        VarianceBasedPruning()(run)
