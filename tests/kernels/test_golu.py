import numpy as np
import pytest
import torch

from kernels.golu import golu, triton

BACKENDS = ("reference", "tiled", "triton")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
PARAMETERS = (0.9, 1.3, 0.8)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs begin as NaN, so that an element nobody writes is seen."""
    empty = torch.empty_like
    monkeypatch.setattr(
        triton.torch, "empty_like", lambda x, **k: empty(x, **k).fill_(float("nan"))
    )


def inputs(dtype, shape=(7, 13, 11)):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()
    return x, torch.randn(*shape, generator=generator).to(dtype)


def exact(x, grad):
    """Value and gradient in float64, written with NumPy."""
    a, b, c = PARAMETERS
    x, grad = x.detach().double().numpy(), grad.double().numpy()
    gate = a * np.exp(-b * np.exp(-c * x))
    return x * gate, grad * (gate + x * gate * b * c * np.exp(-c * x))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient(backend, dtype):
    x, grad = inputs(dtype)
    y = golu(x, *PARAMETERS, backend=backend)
    y.backward(grad)
    for ours, theirs in zip((y, x.grad), exact(x, grad)):
        assert ours.dtype == dtype
        tolerance = TOLERANCE[dtype]
        np.testing.assert_allclose(
            ours.detach().double().numpy(), theirs, rtol=tolerance, atol=4 * tolerance
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [1e-3, 1.0, 50.0])
def test_extremes(backend, beta):
    x = torch.tensor([-1e4, -300.0, -89.0, 0.0, 89.0, 1e4], requires_grad=True)
    y = golu(x, 1.0, beta, 1.0, backend=backend)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert y[:2].abs().max() == 0
    assert y[-1] == 1e4
    assert x.grad[-1] == 1


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_gradients_of_both_orders(backend):
    x = torch.linspace(-4, 4, 17, dtype=torch.float64, requires_grad=True)
    function = lambda x: golu(x, *PARAMETERS, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_triton_refuses_a_second_derivative():
    x, _ = inputs(torch.float32, (5,))
    (first,) = torch.autograd.grad(golu(x, backend="triton").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="require grad"):
        first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """Empty, transposed, and longer than one block."""
    assert golu(torch.empty(0, 3), backend=backend).shape == (0, 3)
    x, _ = inputs(torch.float32, (41, 53))
    expected = golu(x.detach(), backend="reference")
    torch.testing.assert_close(golu(x.T, backend=backend).T, expected)


def test_bad_input():
    with pytest.raises(ValueError, match="x: expected floating point"):
        golu(torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="beta"):
        golu(torch.ones(3), beta=0.0)
    with pytest.raises(ValueError, match="backend"):
        golu(torch.ones(3), backend="cuda")
