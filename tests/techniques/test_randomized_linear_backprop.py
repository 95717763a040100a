import numpy as np
import pytest
import scipy.fft
import torch
from torch import nn

from techniques.callback.probing import exact
from techniques.reparam.randomized_linear_backprop import (
    KINDS,
    RandomizedLinear,
    randomized_linear_backprop,
    sketched,
)
from training.assemble import assemble
from training.compose import compose

ROWS, IN, OUT = 40, 5, 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def layer(ratio=0.5, sketch="gaussian"):
    return RandomizedLinear(nn.Linear(IN, OUT).double(), ratio, sketch)


def matrix(kind, rows, seed=3):
    """S itself: the sketch of the identity."""
    return sketched(torch.eye(ROWS, dtype=torch.float64), torch.tensor(seed), rows, kind)


def gradients(module, x, grad):
    """Of x, weight and bias."""
    out = module(x)
    return torch.autograd.grad(out, [x, *module.parameters()], grad)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_sketch(kind):
    """(S·G)ᵀ(S·x) with the S of the seed the forward draws; the others as `nn.Linear`'s."""
    module = layer(sketch=kind)
    x = torch.randn(4, 10, IN, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 10, OUT, dtype=torch.float64)
    torch.manual_seed(5)
    for_x, for_weight, for_bias = gradients(module, x, grad)
    torch.manual_seed(5)
    s = matrix(kind, 20, int(torch.randint(2**62, ()))).numpy()
    g, rows = grad.reshape(-1, OUT).numpy(), x.detach().reshape(-1, IN).numpy()
    np.testing.assert_allclose(for_weight.numpy(), (s @ g).T @ (s @ rows), rtol=0, atol=1e-10)
    np.testing.assert_allclose(for_x.numpy(), grad.numpy() @ module.weight.detach().numpy(), 1e-12)
    np.testing.assert_allclose(for_bias.numpy(), g.sum(0), 1e-12)


def test_cosines_are_scipys():
    """√(rows/k) times rows of the orthonormal DCT-II."""
    whole = np.sqrt(ROWS / 7) * scipy.fft.dct(np.eye(ROWS), axis=0, norm="ortho")
    for row in matrix("dct", 7).numpy():
        assert np.abs(whole - row).max(1).min() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased(kind):
    """The mean of SᵀS over 4000 draws is 1, within five of its standard errors."""
    draws = torch.stack([matrix(kind, 10, seed) for seed in range(4000)])
    products = draws.mT @ draws
    error = products.std(0) / 4000**0.5 + 1e-12
    assert ((products.mean(0) - torch.eye(ROWS)).abs() < 5 * error).all()


@pytest.mark.parametrize("kind", KINDS)
def test_variance(kind):
    """Over 4000 draws, against closed forms: of Gaussian entries, of signs, and of rows drawn from
    an orthonormal basis. The standard error is near 2%."""
    k = 10
    x, g = torch.randn(ROWS, IN).double() + 0.5, torch.randn(ROWS, OUT).double()
    draws = torch.stack([matrix(kind, k, seed) for seed in range(4000)])
    found = ((draws @ g).mT @ (draws @ x)).var(0).sum().item()
    x, g = x.numpy(), g.numpy()
    norms, product = (x**2).sum() * (g**2).sum(), ((x.T @ g) ** 2).sum()
    if kind == "dct":
        a, b = (scipy.fft.dct(m, axis=0, norm="ortho") for m in (x, g))
        expected = (ROWS * ((a**2).sum(1) * (b**2).sum(1)).sum() - product) / k
    else:
        rows = ((x**2).sum(1) * (g**2).sum(1)).sum()
        expected = (norms + product - (2 * rows if kind == "rademacher" else 0)) / k
    assert found == pytest.approx(expected, rel=0.1)


def test_compiled_backward_has_the_forwards_seed():
    """A seed drawn once more in the backward pass would leave nothing of the gradient."""
    module, x = layer(), torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(ROWS, OUT, dtype=torch.float64)
    found = []
    for run in (module, torch.compile(module, backend="aot_eager")):
        torch.manual_seed(2)
        found.append(gradients(run, x, grad)[1])
    torch.testing.assert_close(*found)


def test_memory_kept():
    """k of the rows are kept for the backward pass, and the weight."""
    x = torch.randn(ROWS, IN, requires_grad=True)

    def saved(ratio):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            RandomizedLinear(nn.Linear(IN, OUT), ratio, "gaussian")(x)
        return sorted(tuple(t.shape) for t in kept if t.ndim)

    for ratio, rows in ((0.5, 20), (0.1, 4), (0.01, 1)):
        assert saved(ratio) == sorted([(rows, IN), (OUT, IN)])


def test_more_than_a_block_of_rows():
    """The blocks of a Gaussian sketch are drawn one after another."""
    x = torch.randn(600, IN, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    blocks = [torch.randn(4, n, generator=generator, dtype=x.dtype) for n in (256, 256, 88)]
    expected = torch.cat(blocks, 1) @ x / 2
    torch.testing.assert_close(sketched(x, torch.tensor(3), 4, "gaussian"), expected)


def test_exact_when_told():
    module, x = layer(0.1), torch.randn(8, IN, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(8, OUT, dtype=torch.float64)
    state = torch.get_rng_state()
    with exact(module):
        found = gradients(module, x, grad)[1]
    with torch.no_grad():
        module(x)
    assert torch.get_rng_state().equal(state)
    torch.testing.assert_close(found, grad.T @ x.detach())


def test_composes():
    config = compose(
        [
            *(
                "technique=randomized_linear_backprop",
                "reparam.randomized_linear_backprop.ratio=0.2",
            ),
            *("reparam.randomized_linear_backprop.sketch=dct", "task.path=tasks", "model.width=32"),
        ]
    )
    model = assemble(config).model
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(isinstance(m, RandomizedLinear) for m in layers)
    assert {(m.ratio, m.sketch) for m in layers} == {(0.2, "dct")}


def test_refusals():
    for keys in ({"ratio": 0.0}, {"ratio": 1.5}, {"sketch": "dft"}, {"targets": "nothing"}):
        with pytest.raises(ValueError, match=f"^{next(iter(keys))}"):
            randomized_linear_backprop(nn.Sequential(nn.Linear(2, 2)), **keys)
