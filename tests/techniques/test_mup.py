import copy
import itertools

import pytest
import torch
from torch import nn

from models.outputs import Outputs
from techniques.reparam.mup import mup
from training.compose import compose


class Tower(nn.Module):
    """Embedding, two hidden layers with a bias, and a readout; the start is the same at a width."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, width)
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 5, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5 if parameter.ndim == 2 else 0.1)
        self.to(dtype)

    def forward(self, input_ids: torch.Tensor) -> Outputs:
        hidden = self.second(self.first(self.embedding(input_ids)).tanh())
        return Outputs(hidden=hidden, logits=self.head(hidden))


TOKENS = torch.arange(7)
LABELS = TOKENS % 5


def train(model, optimizer, steps):
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(TOKENS)["logits"], LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_it_is_the_authors_mu_adam():
    """Their way, written out: smaller initial weights, the learning rate of matrices over m and
    their decay times m, and a readout of inputs over m. With ε = 0 both train alike."""
    width, base, steps = 24, 6, 6
    model, theirs = Tower(width), Tower(width)
    m = width / base
    mup(model, base_width=base)
    hidden = [theirs.first.weight, theirs.second.weight]
    with torch.no_grad():
        for weight in hidden:
            weight /= m**0.5
    theirs.head.register_forward_pre_hook(lambda _, inputs: inputs[0] / m)
    others = [p for p in theirs.parameters() if not any(p is weight for weight in hidden)]
    given = {"lr": 0.01, "weight_decay": 0.1, "eps": 0.0}
    groups = [
        {"params": hidden, **given, "lr": 0.01 / m, "weight_decay": 0.1 * m},
        {"params": others, **given},
    ]
    train(model, torch.optim.AdamW(model.parameters(), **given), steps)
    train(theirs, torch.optim.AdamW(groups), steps)
    for mine, expected in (
        (model.first.weight, theirs.first.weight),
        (model.second.bias, theirs.second.bias),
        (model.embedding.weight, theirs.embedding.weight),
        (model(TOKENS)["logits"], theirs(TOKENS)["logits"]),
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


def test_at_the_base_width_nothing_changes():
    model, plain = Tower(6), Tower(6)
    mup(model, base_width=6)
    for each in (model, plain):
        train(each, torch.optim.AdamW(each.parameters(), lr=0.01), 4)
    assert torch.equal(model(TOKENS)["logits"], plain(TOKENS)["logits"])


def moved(width, reparametrise):
    """Root mean squares over features of how far four steps of Adam move each layer's output."""
    model = Tower(width, torch.float32)
    with torch.no_grad():  # as for a base width of 16 in standard parametrisation
        for weight in (model.first.weight, model.second.weight):
            weight *= 0.1 if reparametrise else 0.1 * (16 / width) ** 0.5
    if reparametrise:
        mup(model, base_width=16)
    seen = []
    layers = (model.embedding, model.first, model.second, model.head)
    hooks = [layer.register_forward_hook(lambda *a: seen.append(a[2])) for layer in layers]
    model(TOKENS)
    train(model, torch.optim.Adam(model.parameters(), lr=0.01), 4)
    seen[4:] = []
    model(TOKENS)
    assert hooks
    return [(after - before).square().mean().sqrt().item() for before, after in zip(seen, seen[4:])]


def test_coordinates_move_alike_at_every_width():
    """The authors' coordinate check: over 16 times the width no layer's output moves 2 times more
    or less, where without it the logits move more than 4 times as far."""
    widths = (32, 128, 512)
    ours = [moved(width, True) for width in widths]
    for narrow, wide in itertools.pairwise(ours):
        assert all(0.5 < after / before < 2 for before, after in zip(narrow, wide))
    plain = [moved(width, False)[-1] for width in widths]
    assert plain[-1] > 4 * plain[0]


def test_the_layers_it_is_told_of():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    start = copy.deepcopy(model)
    mup(model, base_width=2, readout="3", inputs=["0"])
    assert torch.equal(model[0].weight, start[0].weight)
    assert not hasattr(model[0], "parametrizations")
    torch.testing.assert_close(model[2].weight, start[2].weight / 2)
    torch.testing.assert_close(model[3].weight, start[3].weight / 4)
    with pytest.raises(ValueError, match=r"^readout: the model has no linear layer 'heads'"):
        mup(Tower(4), readout="heads")
    with pytest.raises(ValueError, match=r"^base_width: must be at least 1, got 0"):
        mup(Tower(4), base_width=0)


def test_its_settings_are_the_overlays():
    config = compose(["technique=mup", "reparam.mup.base_width=16"])
    assert config["reparam"]["mup"]["base_width"] == 16
