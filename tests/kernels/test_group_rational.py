import numpy as np
import pytest
import torch

from kernels.group_rational import group_rational, triton

BACKENDS = ("reference", "tiled", "triton")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty = torch.empty_like
    monkeypatch.setattr(
        triton.torch, "empty_like", lambda x, **k: empty(x, **k).fill_(float("nan"))
    )


def inputs(dtype=torch.float32, groups=3, channels=21, m=5, n=4):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    x = normal(2, 35, channels).to(dtype).requires_grad_()
    a, b = normal(groups, m + 1).requires_grad_(), normal(groups, n).requires_grad_()
    return x, a, b, normal(2, 35, channels).to(dtype)


def exact(x, a, b):
    """Written term by term in float64."""
    groups, width = len(a), x.shape[-1] // len(a)
    a, b = (c.repeat_interleave(width, 0) for c in (a, b))
    above = sum(a[:, k] * x**k for k in range(a.shape[1]))
    below = 1 + sum((b[:, k] * x ** (k + 1)).abs() for k in range(b.shape[1]))
    assert groups * width == x.shape[-1]
    return above / below


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "n"), [(5, 4), (3, 2)])
def test_value_and_gradients(backend, dtype, m, n):
    x, a, b, grad = inputs(dtype, m=m, n=n)
    y = group_rational(x, a, b, backend=backend)
    assert y.dtype == dtype
    y.backward(grad)
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    expected = exact(*wide)
    expected.backward(grad.double())
    for ours, theirs in [
        (y, expected),
        (x.grad, wide[0].grad),
        (a.grad, wide[1].grad),
        (b.grad, wide[2].grad),
    ]:
        theirs = theirs.detach().numpy()
        np.testing.assert_allclose(
            ours.detach().double().numpy(),
            theirs,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype] * max(abs(theirs).max(), 1),
        )


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_gradcheck(backend):
    x, a, b, _ = inputs(channels=6)
    arguments = [t[:2, :2].double() if t.ndim == 3 else t.double() for t in (x, a, b)]
    arguments = [t.detach().requires_grad_() for t in arguments]
    function = lambda *t: group_rational(*t, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_inputs_stay_finite(backend):
    """With m = n + 1 the value grows like x; powers of 1e4 fit in float32."""
    x = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    a, b = torch.ones(1, 6, requires_grad=True), torch.ones(1, 4, requires_grad=True)
    y = group_rational(x, a, b, backend=backend)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert y[0, 2].item() == pytest.approx(1e4, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    _, a, b, _ = inputs()
    assert group_rational(torch.empty(0, 21), a, b, backend=backend).shape == (0, 21)


def test_bad_input():
    x, a, b, _ = inputs()
    with pytest.raises(ValueError, match="do not divide"):
        group_rational(x[..., :20], a, b)
    with pytest.raises(ValueError, match="denominator: expected 3 groups"):
        group_rational(x, a, b[:2])
    with pytest.raises(ValueError, match="numerator: expected"):
        group_rational(x, a[0], b)
    with pytest.raises(ValueError, match="x: expected"):
        group_rational(x.long(), a, b)
    with pytest.raises(ValueError, match="up to 6 and 4"):
        group_rational(x, torch.ones(3, 8), b, backend="triton")
