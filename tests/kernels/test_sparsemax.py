import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from kernels.sparsemax import sparsemax, triton

BACKENDS = ("reference", "tiled", "triton")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty = torch.empty_like
    fill = lambda x, **keys: empty(x, **keys).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(triton.torch, "empty_like", fill)


def exact(row):
    """By root finding in float64: τ where the positive parts sum to 1."""
    visible = row[np.isfinite(row)]
    if not len(visible):
        return np.zeros_like(row)
    tau = brentq(
        lambda t: np.maximum(visible - t, 0).sum() - 1,
        visible.max() - 1 - 1e-9,
        visible.max() + 1e-9,
        xtol=1e-15,
    )
    return np.where(np.isfinite(row), np.maximum(row - tau, 0), 0)


def scores(dtype=torch.float32, shape=(5, 13)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator) * 2
    x[0, 3:7] = -torch.inf
    x[1] = -torch.inf
    x[2] = 1e4 * torch.randn(shape[1], generator=generator).sign() + x[2]
    x[3] = 0.5
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value(backend, dtype):
    x = scores(dtype)
    ours = sparsemax(x, backend=backend)
    assert ours.dtype == dtype
    theirs = np.stack([exact(row) for row in x.detach().double().numpy()])
    np.testing.assert_allclose(ours.detach().double().numpy(), theirs, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend):
    """The Jacobian is Diag(s) − s sᵀ/|S| with s the support's indicator."""
    x = scores()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    p = sparsemax(x, backend=backend)
    p.backward(upstream)
    support = (p > 0).double()
    count = support.sum(-1, keepdim=True).clamp(min=1)
    grad = upstream.double()
    expected = support * grad - support * (support * grad).sum(-1, keepdim=True) / count
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for backend in ("reference", "tiled"):
        function = lambda x, b=backend: sparsemax(x, backend=b)  # noqa: E731
        assert torch.autograd.gradcheck(function, (x.requires_grad_(),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dimensions_and_empty(backend):
    x = scores()
    expected = sparsemax(x, backend="reference")
    torch.testing.assert_close(sparsemax(x.T, dim=0, backend=backend), expected.T)
    assert sparsemax(torch.empty(0, 4), backend=backend).shape == (0, 4)
    assert sparsemax(torch.ones(3, 1), backend=backend).tolist() == [[1.0]] * 3


def test_a_constant_added_to_the_scores_changes_nothing():
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sparsemax(x + 7.0), sparsemax(x), atol=1e-5, rtol=0)


def test_bad_input():
    with pytest.raises(ValueError, match="x: expected floating point"):
        sparsemax(torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="dim"):
        sparsemax(torch.ones(3), dim=1)
    with pytest.raises(ValueError, match="rows up to"):
        sparsemax(torch.ones(1, 70_000), backend="triton")
