from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from study.probes.hessian import hessian_vector_product
from study.probes.moving import kept
from study.probes.spectrum import HessianSpectrum, density, lanczos, quadrature
from tests.conformance.runs import fitted


def perceptron():
    """A tiny one in float64, its loss, and the whole Hessian by `torch.autograd.functional`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 3).double(), torch.randint(0, 2, (8,))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss(vector):
        parts = vector.split([s.numel() for s in shapes.values()])
        given = {name: part.view(s) for part, (name, s) in zip(parts, shapes.items())}
        return nn.functional.cross_entropy(torch.func.functional_call(model, given, (x,)), y)

    whole: Any = torch.autograd.functional.hessian(loss, flat)
    return model, nn.functional.cross_entropy(model(x), y), whole.numpy()


def test_nodes_of_full_order_are_the_eigenvalues():
    model, loss, whole = perceptron()
    product, size = hessian_vector_product(loss, model)
    assert size == len(whole) == 26
    nodes, weights = quadrature(product, size, order=size, draws=1)
    expected = np.linalg.eigvalsh(whole)
    # Lanczos finds each of them but repeated ones once; here zeros are repeated.
    for node, weight in zip(nodes, weights):
        assert np.abs(expected - node).min() < 1e-7 or weight < 1e-12
    for value in expected[np.abs(expected) > 1e-6]:
        assert np.abs(nodes - value).min() < 1e-7
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_moments_of_a_draw_are_exact():
    """Σ wᵢ λᵢᵏ = vᵀHᵏv for k below twice the order, by NumPy from the same v."""
    _, _, whole = perceptron()
    order = 5
    nodes, weights = quadrature(lambda v: whole @ v, len(whole), order, draws=1, seed=4)
    v = np.random.default_rng(4).standard_normal(len(whole))
    v /= np.linalg.norm(v)
    for k in range(2 * order):
        expected = v @ np.linalg.matrix_power(whole, k) @ v
        assert (weights * nodes**k).sum() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_trace_is_unbiased():
    """Over 2,000 draws, within four standard errors: n·vᵀHv has a variance of about 2·‖H‖²."""
    _, _, whole = perceptron()
    nodes, weights = quadrature(lambda v: whole @ v, len(whole), 1, draws=2000)
    found = len(whole) * (weights * nodes).sum()
    assert found == pytest.approx(
        np.trace(whole), abs=4 * np.linalg.norm(whole) * (2 / 2000) ** 0.5
    )


def test_lanczos_stops_where_the_space_is_spanned():
    """A matrix with two eigenvalues has nothing beyond two vectors."""
    diagonal, off = lanczos(lambda v: np.array([1.0, 1, 1, 3, 3]) * v, np.ones(5), 5)
    assert (len(diagonal), len(off)) == (2, 1)


def test_density():
    grid, values = density(np.array([0.0, 2.0]), np.array([0.75, 0.25]), variance=1e-3)
    step = grid[1] - grid[0]
    assert values.sum() * step == pytest.approx(1)
    assert values[grid < 1].sum() * step == pytest.approx(0.75, abs=1e-9)
    peak = 0.75 / np.sqrt(2 * np.pi * 2e-3)  # the variance times the nodes' range
    assert values.max() == pytest.approx(peak, rel=1e-3)


def test_is_recorded_at_the_end(tmp_path):
    probe = "+callbacks.s={_target_:study.probes.spectrum.HessianSpectrum,samples:32,order:10}"
    steps = ("trainer.max_steps=3", "trainer.eval_every=1")
    never = "callbacks.butterfly_perturbation.step=9"
    run, _ = fitted("butterfly_perturbation", tmp_path / "a", *steps, never, probe)
    plain, _ = fitted("butterfly_perturbation", tmp_path / "b", *steps, never)
    for ours, theirs in zip(run.model.parameters(), plain.model.parameters()):
        assert ours.equal(theirs)
    found = kept(run.folder, "spectrum")
    assert found is not None
    assert found["nodes"].max() == run.last["probe/spectrum_largest"]
    assert found["nodes"].min() == run.last["probe/spectrum_smallest"]
    assert 0 <= run.last["probe/spectrum_negative"] <= 1
    assert found["size"] == sum(p.numel() for p in run.model.parameters())
    assert (run.folder / "probes" / "spectrum.png").is_file()
    assert (tmp_path / "a" / "metrics.jsonl").read_text().count("probe/spectrum_trace") == 1


@pytest.mark.parametrize("given", [{"samples": 0}, {"order": 0}, {"draws": 0}, {"variance": 0}])
def test_refusals(given):
    with pytest.raises(ValueError, match=f"^{next(iter(given))}"):
        HessianSpectrum(**given)
