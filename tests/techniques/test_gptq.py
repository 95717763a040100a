import numpy as np
import pytest
import torch

from techniques.post import grids
from techniques.post.gptq import GPTQ, compensated
from techniques.post.layers import hessians, linear_layers
from techniques.post.layers import matrix as matrix_of
from training.assemble import assemble
from training.compose import compose

BITS = 3


def problem(rows=4, columns=10, seed=0, dead=()):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x[:, list(dead)] = 0
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, x, 2 * x.T @ x / len(x)


def rounding(weight):
    scale, zero = grids.minmax(weight, BITS)
    return lambda column, i: grids.quantised(column[:, None], scale, zero, BITS)[:, 0]


def brain_surgeon(weight, hessian, damp, order):
    """Optimal Brain Quantization in NumPy, of one row after another: the inverse of the Hessian
    of the weights that are left is made anew for each, and its column moves those."""
    dead = np.diag(hessian) == 0
    hessian = hessian + np.diag(dead.astype(float))
    hessian = hessian + damp * np.diag(hessian).mean() * np.eye(len(hessian))
    result = np.where(dead, 0.0, weight)
    for row, original in zip(result, weight):
        own = np.where(dead, 0.0, original)
        low, high = min(own.min(), 0), max(own.max(), 0)
        step = (high - low) / (2**BITS - 1)
        values = (np.arange(2**BITS) - np.round(-low / step)) * step
        left = list(order)
        while left:
            inverse = np.linalg.inv(hessian[np.ix_(left, left)])
            chosen = values[np.abs(values - row[left[0]]).argmin()]
            error = (row[left[0]] - chosen) / inverse[0, 0]
            row[left] -= error * inverse[:, 0]
            row[left[0]] = chosen
            left = left[1:]
    return result


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dead", [(), (0, 7)])
@pytest.mark.parametrize("damp", [0.01, 0.5])
def test_column_loop_is_optimal_brain_quantization(descending, dead, damp):
    weight, _, hessian = problem(dead=dead)
    weight[:, list(dead)] = 0
    diagonal = hessian.diagonal().numpy()
    order = np.argsort(-diagonal, kind="stable") if descending else np.arange(10)
    expected = brain_surgeon(weight.numpy(), hessian.numpy(), damp, order)
    found, _ = compensated(weight, hessian, rounding(weight), damp, descending)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-10)


def test_uncorrelated_inputs_are_rounding_to_nearest():
    weight, _, _ = problem()
    hessian = torch.diag(torch.arange(1, 11, dtype=torch.float64))
    nearest = grids.quantised(weight, *grids.minmax(weight, BITS), BITS)
    found, errors = compensated(weight, hessian, rounding(weight), damp=1e-12)
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-12)
    # The loss is half of Σ H_ii·(w − q)².
    expected = (weight - nearest).square() * hessian.diagonal()
    torch.testing.assert_close(errors.square(), expected, rtol=1e-9, atol=1e-12)


def test_errors_are_the_loss_that_is_added():
    """Σe² is the quadratic form of the whole change, in which λ has its part."""
    weight, _, hessian = problem()
    found, errors = compensated(weight, hessian, rounding(weight), damp=0.1)
    full = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(10).double()
    change = found - weight
    expected = torch.einsum("rc,cd,rd->r", change, full, change)
    torch.testing.assert_close(errors.square().sum(1), expected, rtol=1e-10, atol=1e-12)


def test_outputs_are_nearer_than_with_rounding():
    better = 0
    for seed in range(20):
        weight, x, hessian = problem(rows=8, seed=seed)
        nearest = grids.quantised(weight, *grids.minmax(weight, BITS), BITS)
        found, _ = compensated(weight, hessian, rounding(weight))
        errors = [((w - weight) @ x.T).square().sum() for w in (found, nearest)]
        better += bool(errors[0] < errors[1])
    assert better >= 19


def test_no_error_changes_nothing():
    """A grid that has every weight changes none."""
    weight, _, hessian = problem()
    found, errors = compensated(weight, hessian, lambda column, i: column)
    assert found.equal(weight)
    assert (errors == 0).all()


def run_of(*overrides):
    small = ("model.width=16", "model.depth=2", "tracker=none", "trainer.device=cpu")
    return assemble(compose(["task=digits", "model=mlp", *small, *overrides]))


@pytest.mark.parametrize("group", [None, 8])
def test_a_run_becomes_quantised(group):
    run = run_of()
    before = {n: matrix_of(layer) for n, layer in linear_layers(run.model).items()}
    exact = hessians(run, linear_layers(run.model), 60)
    GPTQ(bits=3, samples=60, group=group, exclude="head")(run)
    assert set(run.grids) == {f"{n}.weight" for n in before if n != "head"}
    first = next(iter(before))
    for name, layer in linear_layers(run.model).items():
        weight = matrix_of(layer)
        if name == "head":
            assert weight.equal(before[name])
            continue
        scale, zero = grids.minmax(before[name], 3, group=group)
        assert grids.quantised(weight, scale, zero, 3).equal(weight)  # to the bit on its grid
        if name == first:
            plain = grids.quantised(before[name], scale, zero, 3)
            wrong = [(w - before[name]).double() for w in (weight, plain)]
            errors = [torch.einsum("rc,cd,rd->", e, exact[name], e) for e in wrong]
            assert errors[0] < errors[1]


@pytest.mark.parametrize("settings", [{"bits": 0}, {"bits": 9}, {"samples": 0}, {"damp": 0}])
def test_what_it_refuses(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GPTQ(**settings)
