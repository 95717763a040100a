import copy
import itertools
import math

import pytest
import torch
from torch import nn

from study.probes.memory import Flops, Live
from techniques.reparam.gradient_checkpointing import divided, gradient_checkpointing
from training.assemble import assemble
from training.compose import compose

WIDTH, BATCH = 16, 64


class Net(nn.Module):
    """Layers that all take an argument besides, in an `nn.ModuleList` or an `nn.Sequential`."""

    def __init__(self, layers):
        super().__init__()
        self.stack = layers
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x, scale=None):
        if isinstance(self.stack, nn.Sequential):
            return self.head(self.stack(x))
        for layer in self.stack:
            x = layer(x, scale=scale)
        return self.head(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

    def forward(self, x, scale):
        return torch.relu(self.dropout(self.linear(x)) * scale)


def listed(depth):
    torch.manual_seed(0)
    return Net(nn.ModuleList(Layer() for _ in range(depth)))


def chained(depth, norm=nn.Identity):
    torch.manual_seed(0)
    parts = (nn.Sequential(nn.Linear(WIDTH, WIDTH), norm(), nn.ReLU()) for _ in range(depth))
    return Net(nn.Sequential(*parts))


def step(model, *args, batch=BATCH):
    """Gradients, buffers, what is next of the random numbers, peak bytes and FLOPs of a step."""
    torch.manual_seed(1)
    x = torch.randn(batch, WIDTH)
    with Live() as live, Flops() as flops:
        model(x, *args).square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return grads, dict(model.named_buffers()), torch.rand(1), live.peak, flops


KEYS = (
    {},
    {"segments": 2},
    {"segments": 99},
    {"recursive": True},
    {"recursive": True, "segments": 3},
)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("depth", [2, 7])
def test_every_bit_is_that_of_the_plain_run(keys, depth):
    """With dropout, whose numbers are drawn again alike, and with batch norm's statistics."""
    batch_norm = lambda: nn.BatchNorm1d(WIDTH)  # noqa: E731
    for model, args in ((listed(depth), [torch.tensor(1.1)]), (chained(depth, batch_norm), [])):
        plain, other = copy.deepcopy(model), model
        gradient_checkpointing(other, **keys)
        expected, found = step(plain, *args), step(other, *args)
        for these, those in zip(expected[:2], found[:2]):
            assert list(these) == list(those)
            assert all(these[name].equal(those[name]) for name in these)
        assert expected[2].equal(found[2])


def test_recomputes_one_forward_of_the_segments():
    depth = 16
    plain, other = chained(depth), chained(depth)
    gradient_checkpointing(other)
    forward = depth * 2 * BATCH * WIDTH**2
    before, after = step(plain)[4], step(other)[4]
    assert (before.recomputed, after.recomputed) == (0, forward)
    assert after.total == before.total + forward


@pytest.mark.parametrize("depth", [4, 64])
def test_recursion_recomputes_a_forward_for_each_halving_at_most(depth):
    other = chained(depth)
    gradient_checkpointing(other, recursive=True)
    forward = depth * 2 * BATCH * WIDTH**2
    # torch stops once a segment's last part has its input, which saves half of each but the last.
    halvings = int(math.log2(depth))
    assert step(other)[4].recomputed == forward * (1 + (halvings - 1) / 2) <= forward * halvings


def test_memory_grows_as_said():
    """Four times the layers: four times the activations, twice, or a constant more."""
    grown = {}
    for name, keys in {"plain": None, "root": {}, "recursive": {"recursive": True}}.items():
        peaks = []
        for depth in (16, 64):
            model = chained(depth)
            if keys is not None:
                gradient_checkpointing(model, **keys)
            peaks.append(step(model, batch=2048)[3])
        grown[name] = peaks[1] / peaks[0]
    assert grown["plain"] == pytest.approx(4, rel=0.1)
    assert grown["root"] == pytest.approx(2, rel=0.1)
    assert grown["recursive"] < 1.5


def test_parts_are_even():
    parts = divided(list(range(11)), None, False)
    assert parts == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]
    whole = itertools.chain.from_iterable(divided(list(range(768)), None, False))
    assert list(whole) == list(range(768))


def test_evaluation_keeps_nothing():
    model = listed(9)
    gradient_checkpointing(model)
    with torch.no_grad(), Live() as live:
        model(torch.randn(BATCH, WIDTH), torch.tensor(1.0))
    assert live.peak < 8 * BATCH * WIDTH * 4


def test_composes():
    run = assemble(
        compose(
            [
                *("technique=gradient_checkpointing", "task=digits", "model.depth=8"),
                *("tracker=none", "trainer.device=cpu"),
                "+reparam.gradient_checkpointing.segments=3",
                "+reparam.gradient_checkpointing.recursive=true",
            ]
        )
    )
    assert (run.model.layers.segments, run.model.layers.recursive) == (3, True)
    assert next(iter(run.model.state_dict())) == "layers.0.weight"


def test_refusals():
    with pytest.raises(ValueError, match="segments: must be at least 2"):
        gradient_checkpointing(listed(3), segments=1)
    with pytest.raises(ValueError, match="has no stack of layers"):
        gradient_checkpointing(Net(nn.ModuleList([Layer()])))
