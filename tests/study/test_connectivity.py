import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.mlp import MLP
from study.probes.alignment import aligned, hidden_units
from study.probes.connectivity import Connectivity, barrier, distance, linear_cka, state_of
from study.probes.moving import kept
from tests.conformance.runs import fitted
from training.errors import UsageError


def mlp(depth=2, width=6, norm: Any = nn.LayerNorm, seed=0):
    torch.manual_seed(seed)
    model = MLP(3, 2, width=width, depth=depth, activation=nn.ReLU, norm=norm, head=nn.Linear)
    for p in model.parameters():
        nn.init.normal_(p)
    return model.double()


def shuffled(model):
    """A state of the same function with hidden units in another order, written out by hand."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for first, following in ((0, "layers.3"), (3, "head")):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(first))
        for name in state:
            if name.startswith((f"layers.{first}.", f"layers.{first + 1}.")) and state[name].ndim:
                state[name] = state[name][order]
        state[f"{following}.weight"] = state[f"{following}.weight"][:, order]
    return state


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_alignment_finds_a_shuffle(norm):
    model = mlp(norm=norm)
    ours = {name: t.clone() for name, t in model.state_dict().items()}
    theirs = shuffled(model)
    x = torch.randn(4, 3).double()
    before = model.eval()(features=x)["logits"]
    model.load_state_dict(theirs)
    torch.testing.assert_close(model(features=x)["logits"], before)
    found = aligned(hidden_units(model), ours, theirs)
    assert all(found[name].equal(ours[name]) for name in ours)
    assert not theirs["layers.0.weight"].equal(ours["layers.0.weight"])


def test_one_hidden_layer_gets_its_best_order():
    """Against the distances of all 120 orders."""
    one, other = mlp(1, 5, nn.Identity, seed=1), mlp(1, 5, nn.Identity, seed=2)
    ours, theirs = state_of(one), state_of(other)
    names = list(ours)
    moved = aligned(hidden_units(one), ours, theirs)

    def permuted(order):
        rows = {n: t[list(order)] for n, t in theirs.items() if n.startswith("layers")}
        return {**theirs, **rows, "head.weight": theirs["head.weight"][:, list(order)]}

    every = [distance(ours, permuted(o), names) for o in itertools.permutations(range(5))]
    assert distance(ours, moved, names) == pytest.approx(min(every), abs=1e-12)
    x = torch.randn(4, 3).double()
    expected = other(features=x)["logits"]
    other.load_state_dict(moved)
    torch.testing.assert_close(other(features=x)["logits"], expected)


def test_refuses_what_it_cannot_align():
    with pytest.raises(UsageError, match="model=mlp"):
        hidden_units(nn.Linear(2, 2))


def test_barrier():
    assert barrier(np.array([1.0, 2.0, 5.0, 3.0, 2.0])) == pytest.approx(5 - 1.5)
    assert barrier(np.array([3.0, 1.0, 0.5, 0.2, 1.0])) == 0


def test_cka():
    """1 for a rotation with a scale and a shift; of centred features by NumPy's Gram matrices."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    assert linear_cka(x, 3 * x @ q + 1) == pytest.approx(1, abs=1e-12)
    centre = np.eye(20) - 1 / 20
    k, m = (centre @ (z @ z.T).numpy() @ centre for z in (x, y))
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert linear_cka(x, y) == pytest.approx(expected, abs=1e-12)


def train(folder, *given):
    steps = ("trainer.max_steps=4", "trainer.eval_samples=8")
    never = "callbacks.butterfly_perturbation.step=9"
    return fitted("butterfly_perturbation", folder, *steps, *(given or (never,)))[0]


def test_twins(tmp_path):
    """A run and its twin are one; one that was pushed is not, by as much as its weights say."""
    first = train(tmp_path / "a")
    probe = f"+callbacks.c={{_target_:study.probes.connectivity.Connectivity,to:{first.folder},"
    probe += "points:5,samples:64,align:true,cka:true}"
    step = "callbacks.butterfly_perturbation."
    same = train(tmp_path / "b", f"{step}step=9", probe)
    assert same.last["probe/distance"] == same.last["probe/aligned_distance"] == 0
    assert same.last["probe/barrier"] == pytest.approx(0, abs=1e-7)
    assert same.last["probe/cka"] == pytest.approx(1, abs=1e-6)
    other = train(tmp_path / "c", f"{step}scale=0.5", probe)
    plain = train(tmp_path / "d", f"{step}scale=0.5")
    ours, theirs = (torch.cat([p.flatten() for p in r.model.parameters()]) for r in (plain, first))
    assert other.last["probe/distance"] == pytest.approx((ours - theirs).norm().item(), rel=1e-5)
    assert other.last["probe/aligned_distance"] <= other.last["probe/distance"]
    assert other.last["probe/cka"] < 1
    for mine, its in zip(other.model.parameters(), plain.model.parameters()):
        assert mine.equal(its)  # it leaves no trace
    found = kept(other.folder, "connectivity")
    assert found is not None
    assert other.last["probe/barrier"] == barrier(found["losses"])
    assert found["losses"].shape == found["aligned_losses"].shape == (5,)


def test_batch_norms_are_measured_anew_and_left_alone(tmp_path):
    norm = "model.norm._target_=torch.nn.BatchNorm1d"
    never = "callbacks.butterfly_perturbation.step=9"
    first = train(tmp_path / "a", never, norm)
    probe = f"+callbacks.c={{_target_:study.probes.connectivity.Connectivity,to:{first.folder},"
    second = train(tmp_path / "b", never, norm, probe + "points:3,samples:64}")
    for mine, its in zip(second.model.state_dict().values(), first.model.state_dict().values()):
        assert mine.equal(its)
    found = kept(second.folder, "connectivity")
    assert found is not None
    assert np.ptp(found["losses"]) < 1e-6


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"^points"):
        Connectivity(str(tmp_path), points=2)
    with pytest.raises(ValueError, match=r"^samples"):
        Connectivity(str(tmp_path), samples=0)
    with pytest.raises(UsageError, match="no checkpoint"):
        Connectivity(str(tmp_path))
