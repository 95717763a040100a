from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.resnet import ResNet
from study.probe_figures import own
from study.probes.moving import kept
from techniques.callback.filter_normalized_landscape import (
    FilterNormalizedLandscape,
    concave,
    directions,
    surface,
)
from tests.conformance.runs import fitted

AXIS = np.linspace(-1, 1, 5)


def generator():
    return torch.Generator().manual_seed(3)


def test_directions_have_the_norms_of_the_filters():
    """Rows of a linear layer and output channels of a convolution, by NumPy; vectors stay."""
    torch.manual_seed(0)
    weights = {"linear": torch.randn(4, 3), "conv": torch.randn(2, 3, 2, 2), "bias": torch.randn(4)}
    weights = {name: w.double() for name, w in weights.items()}
    found = directions(weights, generator())
    draws = generator()
    for name, weight in weights.items():
        drawn = torch.randn(weight.shape, generator=draws, dtype=torch.float64).numpy()
        expected = np.zeros_like(drawn)
        if weight.ndim > 1:
            for i, (d, w) in enumerate(zip(drawn, weight.numpy())):
                expected[i] = d * np.linalg.norm(w) / (np.linalg.norm(d) + 1e-10)
        np.testing.assert_allclose(found[name].numpy(), expected, atol=1e-12)
    plain = directions({"linear": weights["linear"]}, generator(), "none")["linear"]
    assert plain.equal(torch.randn(4, 3, generator=generator(), dtype=torch.float64))


def perceptron(scale):
    """The same function for every scale: ReLU lets it through from layer to layer."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[0].bias.mul_(scale)
        model[2].weight.div_(scale)
    return model


@torch.no_grad()
def losses(model, normalise, dimensions=2):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    draws = generator()
    axes = [directions(parameters, draws, normalise) for _ in range(dimensions)]
    before = [p.clone() for p in model.parameters()]
    loss = nn.functional.cross_entropy
    found = surface(parameters, axes, AXIS, lambda: loss(model(x), x[:, 0].gt(0).long()).item())
    assert all(p.equal(b) for p, b in zip(model.parameters(), before))
    return np.reshape(found, [len(AXIS)] * dimensions)


def test_a_rescaled_network_has_the_same_landscape():
    np.testing.assert_allclose(
        losses(perceptron(1), "filter"), losses(perceptron(10), "filter"), rtol=1e-8
    )
    other = losses(perceptron(10), "none")
    assert np.abs(losses(perceptron(1), "none") - other).max() > 0.1


def test_surface_of_a_quadratic():
    """½‖W‖² at W + a·d + b·e in closed form; the last axis is the fastest."""
    weight = torch.randn(4, 3, generator=generator(), dtype=torch.float64)
    draws = torch.Generator().manual_seed(5)
    axes = [directions({"w": weight}, draws) for _ in range(2)]
    found = surface({"w": weight}, axes, AXIS, lambda: 0.5 * weight.square().sum().item())
    w, d, e = (t.numpy().copy() for t in (weight, axes[0]["w"], axes[1]["w"]))
    expected = [0.5 * np.square(w + a * d + b * e).sum() for a in AXIS for b in AXIS]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert concave(np.reshape(found, (1, 5, 5))) == 0


def test_concave():
    x = np.linspace(-1, 1, 41)
    assert concave(x[None] ** 2) == 0
    assert concave(3 + 0 * x[None]) == 0
    assert concave(np.cos(np.pi * (x + 0.01))[None] + 2) == pytest.approx(0.5, abs=0.03)
    # Along one axis of two.
    assert concave((x[:, None] ** 2 - x[None] ** 2 + 5)[None]) == 0.5


def test_keeps_its_landscape_and_leaves_no_trace(tmp_path):
    point = "callbacks.filter_normalized_landscape."
    given = (f"{point}points=5", f"{point}samples=16", f"{point}draws=2", f"{point}name=plane")
    run, _ = fitted("filter_normalized_landscape", tmp_path / "a", "trainer.max_steps=3", *given)
    found = kept(run.folder, "plane")
    assert found is not None
    assert found["losses"].shape == (2, 5, 5)
    assert found["losses"][0, 2, 2] == found["losses"][1, 2, 2] == run.last["probe/plane_loss"]
    assert not np.array_equal(found["losses"][0], found["losses"][1])
    inside = found["losses"] <= run.last["probe/plane_loss"] + 1
    assert run.last["probe/plane_basin"] == pytest.approx(inside.mean())
    assert (run.folder / "probes" / "plane.png").is_file()
    never = "callbacks.butterfly_perturbation.step=9"
    plain, _ = fitted("butterfly_perturbation", tmp_path / "b", "trainer.max_steps=3", never)
    for ours, theirs in zip(run.model.parameters(), plain.model.parameters()):
        assert ours.equal(theirs)
    assert own([{"arm": "a", "seed": 0, "run_dir": str(run.folder)}]) == []  # of another name


def test_a_network_without_shortcuts_is_a_chain():
    torch.manual_seed(0)
    keys: Any = {"activation": nn.ReLU, "norm": nn.BatchNorm2d, "head": nn.Linear}
    model: Any = ResNet(1, 3, width=2, depth=1, shortcuts=False, **keys).eval()
    x = torch.randn(2, 1, 8, 8)
    y = model.stem(x)
    for block in model.blocks:
        y = torch.relu(block.norm1(block.conv1(y)))
        y = torch.relu(block.norm2(block.conv2(y)))
    torch.testing.assert_close(model(x)["hidden"], y.mean(dim=(2, 3)))
    with pytest.raises(ValueError, match=r"^model\.shortcuts"):
        ResNet(1, 3, width=2, depth=1, preactivation=True, shortcuts=False, **keys)


@pytest.mark.parametrize(
    "given",
    [{"dimensions": 3}, {"points": 2}, {"draws": 0}, {"samples": 0}, {"span": 0}, {"rise": 0}],
)
def test_refusals(given):
    with pytest.raises(ValueError, match=f"^{next(iter(given))}"):
        FilterNormalizedLandscape(**given)


def test_refuses_another_norm():
    with pytest.raises(ValueError, match=r"^normalise"):
        FilterNormalizedLandscape(normalise="layer")
