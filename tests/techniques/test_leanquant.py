import numpy as np
import pytest
import torch

from techniques.post.gptq import compensated
from techniques.post.layers import linear_layers
from techniques.post.layers import matrix as matrix_of
from techniques.post.leanquant import LeanQuant, importance, learned, rounding
from tests.conformance.runs import tiny
from training.assemble import assemble
from training.packing import Codebook


def problem(rows=4, columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, 2 * x.T @ x / len(x)


def lloyd(row, costs, centres):
    """Weighted k-means in NumPy, until nothing moves."""
    while True:
        nearest = np.abs(row[:, None] - centres).argmin(1)
        moved = np.array(
            [
                np.average(row[nearest == k], weights=costs[nearest == k])
                if (nearest == k).any()
                else centres[k]
                for k in range(len(centres))
            ]
        )
        if np.abs(moved - centres).max() == 0:
            return np.sort(moved)
        centres = moved


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_grid_is_that_of_weighted_k_means_from_evenly_spaced_values(bits):
    weight, hessian = problem(columns=40)
    costs = importance(hessian, 3.0, 0.1, descending=True)
    found = learned(weight, costs, bits).numpy()
    for row, values in zip(weight.numpy(), found):
        start = np.linspace(row.min(), row.max(), 2**bits)
        taken = np.abs(row[:, None] - start).argmin(1)
        if len(set(taken)) == 2**bits:  # an empty cluster has no mean
            np.testing.assert_allclose(values, lloyd(row, costs.numpy(), start), rtol=1e-5)


@pytest.mark.parametrize("descending", [False, True])
def test_importance_is_of_the_inverse_hessian_of_the_columns_left(descending):
    _, hessian = problem(columns=9)
    full = hessian.numpy() + 0.1 * hessian.diagonal().numpy().mean() * np.eye(9)
    order = np.argsort(-hessian.diagonal().numpy()) if descending else np.arange(9)
    expected = np.empty(9)
    for step, column in enumerate(order):
        left = order[step:]
        expected[column] = np.linalg.inv(full[np.ix_(left, left)])[0, 0] ** (-3.0 / 2)
    found = importance(hessian, 3.0, 0.1, descending).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_large_costs_keep_the_dearest_weight():
    """In the limit a grid has it exactly."""
    weight, _ = problem()
    costs = torch.ones(24, dtype=torch.float64)
    costs[7] = 1e9
    nearest = (learned(weight, costs, 2).double() - weight[:, 7, None]).abs().amin(1)
    assert (nearest < 1e-6).all()


def test_a_row_of_few_values_is_kept():
    weight = torch.tensor([[0.0, 1.5, 1.5, -2.0, 0.0]])
    found = learned(weight, torch.ones(5), 2)
    assert found.tolist() == [[-2.0, 0.0, 1.5, 1.5]]
    kept, errors = compensated(weight, torch.eye(5).double(), rounding(found))
    assert kept.equal(weight.double())
    assert (errors == 0).all()


def test_rounding_takes_each_rows_nearest_value():
    book = torch.tensor([[-1.0, 0.0, 2.0], [5.0, 6.0, 7.0]])
    found = rounding(book)(torch.tensor([1.1, -3.0], dtype=torch.float64), 0)
    assert found.tolist() == [2.0, 5.0]


def test_overlay_and_a_quantised_run(tmp_path):
    config, _ = tiny("leanquant", tmp_path, "post.leanquant.bits=2", "post.leanquant.samples=8")
    run = assemble(config)
    (step,) = run.post.values()
    assert isinstance(step, LeanQuant)
    assert (step.bits, step.samples, step.exponent) == (2, 8, 4.0)
    step.exclude = "head|ffn"
    before = {name: matrix_of(layer) for name, layer in linear_layers(run.model).items()}
    step(run)
    for name, layer in linear_layers(run.model).items():
        weight, grid = matrix_of(layer), run.grids.get(f"{name}.weight")
        if grid is None:
            assert "head" in name or "ffn" in name
            assert weight.equal(before[name])
            continue
        assert isinstance(grid, Codebook)
        assert max(len(row.unique()) for row in weight) <= 4
        assert grid.values(grid.codes(weight)).equal(weight)


@pytest.mark.parametrize("settings", [{"bits": 9}, {"exponent": -1.0}, {"damp": 0.0}])
def test_what_it_refuses(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LeanQuant(**settings)
