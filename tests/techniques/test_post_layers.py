from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian

from tasks.fetch import fetch
from techniques.post import layers
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

SMALL = [
    *("model.width=8", "model.depth=2", "tracker=none", "trainer.device=cpu"),
    "trainer.batch_size=8",
]


def run_of(*overrides):
    return assemble(compose([*overrides, *SMALL]))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (1, 2)},
        {"kernel_size": 4, "padding": "same"},
    ],
)
def test_a_convolution_is_its_patches_times_its_weight_matrix(settings):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, **settings).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    layer.bias = None
    found = layers.rows(layer, x) @ layer.weight.flatten(1).T
    expected = layer(x).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_hessian_is_that_of_the_mean_squared_output():
    run = run_of("task=digits", "model=mlp", "model.norm._target_=torch.nn.Identity")
    chosen = layers.linear_layers(run.model, exclude="head")
    seen = layers.inputs(run, chosen, 50)
    for name, found in layers.hessians(run, chosen, 50).items():
        x = seen[name].double()
        assert x.shape == (50, chosen[name].in_features)
        exact = hessian(lambda row, x=x: (x @ row).square().mean(), torch.zeros_like(x[0]))
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_inputs_are_those_of_a_forward_and_the_head_has_some():
    run = run_of("task=code", "task.context_length=16", "model.heads=2")
    chosen = layers.linear_layers(run.model)
    assert "head" in chosen
    assert "head" not in layers.linear_layers(run.model, exclude="^head$")
    seen = layers.inputs(run, chosen, 70)  # two batches
    assert set(seen) == set(chosen)
    assert all(x.shape == (70 * 16, chosen[name].in_features) for name, x in seen.items())
    weights = {name: layer.weight.detach().clone() for name, layer in chosen.items()}
    run.model.eval()
    rows = fetch(run.task.train, torch.arange(70) * len(run.task.train) // 70)
    batch = run.task.prepare(rows, torch.Generator(), False)
    with torch.no_grad():
        hidden = run.model(batch["input_ids"])["hidden"]
    torch.testing.assert_close(seen["head"], hidden.flatten(0, 1), rtol=0, atol=1e-5)
    assert all(layer.weight.equal(weights[name]) for name, layer in chosen.items())


def test_nothing_of_the_run_changes():
    run = run_of("task=digits", "model=mlp", "model.norm._target_=torch.nn.BatchNorm1d")
    chosen = layers.linear_layers(run.model)
    state, random = torch.random.get_rng_state(), [v.clone() for v in run.model.buffers()]
    layers.inputs(run, chosen, 20)
    assert run.model.training
    assert torch.random.get_rng_state().equal(state)
    assert all(a.equal(b) for a, b in zip(run.model.buffers(), random))
    assert not any(m._forward_pre_hooks for m in run.model.modules())


def test_later_layers_see_what_was_done_to_earlier_ones():
    run = run_of("task=digits", "model=mlp", "model.norm._target_=torch.nn.Identity")
    chosen = layers.linear_layers(run.model)
    for number, (_, layer, second) in enumerate(layers.one_by_one(run, chosen, 20)):
        if number:
            assert (second == 0).all()
        for parameter in layer.parameters():
            parameter.data.zero_()


def test_give_and_matrix():
    layer = nn.Conv2d(2, 3, 2)
    wanted = torch.arange(24, dtype=torch.float64).view(3, 8)
    layers.give(layer, wanted)
    assert layers.matrix(layer).equal(wanted.float())
    assert layer.weight[1, 1, 0, 1] == 13


def test_what_it_refuses():
    run = SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UsageError, match="exclude"):
        layers.linear_layers(run.model, exclude="0")
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Linear(4, 2))
    assert set(layers.linear_layers(grouped)) == {"1"}
