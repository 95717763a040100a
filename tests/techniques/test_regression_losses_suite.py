import math
import statistics

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar

from techniques.loss.regression_losses_suite import SUITE, RegressionLoss
from training.assemble import assemble
from training.compose import compose

KEYS = {"delta": 0.7, "quantile": 0.8}


def loss_of(name, forecasts, labels, **keys):
    return RegressionLoss(name, **keys)({"logits": forecasts}, {"labels": labels})


def draw(shape=(6, 2, 3)):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def by_loops(name, f, y):
    """The survey's and the code's formulas of nested lists (rows of the last dimension)."""
    rows = list(zip(f, y))
    f, y = ([x for row in rows_ for x in row] for rows_ in (f, y))
    pairs, n = list(zip(f, y)), len(y)
    center, q, d = sum(y) / n, KEYS["quantile"], KEYS["delta"]
    squares = sum((b - a) ** 2 for a, b in pairs)

    def log(x):
        return math.log(max(x, 1e-7) + 1)

    def huber(e):
        return e * e / 2 if e <= d else d * e - d * d / 2

    def row_of_logs(row):
        terms = [(log(a) - log(b)) ** 2 for a, b in zip(*row)]
        return math.sqrt(sum(terms) / len(terms))

    return {
        "mae": lambda: sum(abs(b - a) for a, b in pairs) / n,
        "mse": lambda: squares / n,
        "mbe": lambda: sum(b - a for a, b in pairs) / n,
        "rae": lambda: sum(abs(b - a) for a, b in pairs) / sum(abs(b - center) for b in y),
        "rse": lambda: squares / sum((b - center) ** 2 for b in y),
        "mape": lambda: 100 * sum(abs((b - a) / b) for a, b in pairs) / n,
        "rmse": lambda: math.sqrt(squares / n),
        "msle": lambda: sum((log(a) - log(b)) ** 2 for a, b in pairs) / n,
        "rmsle": lambda: sum(row_of_logs(row) for row in rows) / len(rows),
        "nrmse": lambda: math.sqrt(squares / n) / statistics.pstdev(f),
        "rrmse": lambda: math.sqrt(squares / sum(a * a for a in f)),
        "huber": lambda: sum(huber(abs(b - a)) for a, b in pairs) / n,
        "log_cosh": lambda: sum(math.log(math.cosh(b - a)) for a, b in pairs) / n,
        "quantile": lambda: sum((q if b > a else 1 - q) * abs(b - a) for a, b in pairs) / n,
    }[name]()


@pytest.mark.parametrize("name", SUITE)
def test_is_its_formula(name):
    forecasts, labels = draw()
    losses = loss_of(name, forecasts.flatten(1), labels, **KEYS)
    expected = by_loops(name, forecasts.view(-1, 3).tolist(), labels.view(-1, 3).tolist())
    assert losses.shape == labels.shape
    assert losses.mean().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SUITE)
def test_of_one_label_a_sample_the_batch_is_the_row(name):
    """As a table's labels are."""
    forecasts, labels = draw((9,))
    expected = by_loops(name, [forecasts.tolist()], [labels.tolist()])
    losses = loss_of(name, forecasts[:, None], labels, **KEYS)
    assert losses.mean().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SUITE)
def test_gradient(name):
    forecasts, labels = draw((4, 3))
    loss = lambda f: loss_of(name, f, labels, **KEYS)  # noqa: E731
    assert torch.autograd.gradcheck(loss, forecasts.requires_grad_())
    assert torch.autograd.gradcheck(lambda f: loss(f).mean(), forecasts)


@pytest.mark.parametrize("name", SUITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_finite_far_out(name, dtype):
    """Also where forecasts are all the same, and where they are the labels, one of which is 0."""
    for values in ([-1e4, 1e4, 0.0, 1.0], [1e4] * 4, [-1e4] * 4, [0.0] * 4, [0.0, 1.0, -2.0, 5.0]):
        forecasts = torch.tensor(values, dtype=dtype).requires_grad_()
        losses = loss_of(name, forecasts, torch.tensor([0.0, 1.0, -2.0, 5.0]))
        assert losses.dtype == torch.float32
        assert losses.isfinite().all()
        losses.mean().backward()
        assert forecasts.grad.isfinite().all()


LABELS = np.random.default_rng(0).lognormal(0.5, 1.0, 41)


def weighted_median(values, weights):
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) >= weights.sum() / 2
    return values[order][np.argmax(reached)]


CONSTANTS = {
    "mae": np.median(LABELS),
    "mse": LABELS.mean(),
    "rae": np.median(LABELS),
    "rse": LABELS.mean(),
    "mape": weighted_median(LABELS, 1 / LABELS),
    "rmse": LABELS.mean(),
    "msle": np.exp(np.log1p(LABELS).mean()) - 1,
    "rmsle": np.median(LABELS),
    "rrmse": (LABELS**2).sum() / LABELS.sum(),
    "quantile": np.sort(LABELS)[32],  # the 33rd of 41 is above four fifths
}


def of_constant(name, c, shape=(41, 1)):
    labels = torch.from_numpy(LABELS).view(shape)
    return loss_of(name, torch.full(shape, float(c)).double(), labels, **KEYS).mean().item()


def best_constant(name, shape=(41, 1)):
    found = minimize_scalar(
        lambda c: of_constant(name, c, shape),
        bounds=(LABELS.min(), LABELS.max()),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return found.x


@pytest.mark.parametrize("name", CONSTANTS)
def test_the_best_constant_forecast(name):
    assert best_constant(name) == pytest.approx(CONSTANTS[name], abs=1e-5)


def test_the_best_constant_of_rmsle_over_all_labels_is_that_of_msle():
    assert best_constant("rmsle", (41,)) == pytest.approx(CONSTANTS["msle"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "pull"),
    [("huber", lambda e: np.clip(e, -KEYS["delta"], KEYS["delta"])), ("log_cosh", np.tanh)],
)
def test_the_best_constant_between_median_and_mean(name, pull):
    best = best_constant(name)
    assert pull(LABELS - best).sum() == pytest.approx(0, abs=1e-4)
    assert np.median(LABELS) < best < LABELS.mean()


def test_mbe_has_no_minimum_and_nrmse_wants_forecasts_too_wide():
    assert of_constant("mbe", 1e6) < of_constant("mbe", 1e3) < of_constant("mbe", 0)
    rng = np.random.default_rng(1)
    x, labels = torch.from_numpy(LABELS), torch.from_numpy(LABELS + rng.normal(0, 2, 41))
    found = minimize(
        lambda p: loss_of("nrmse", p[0] + p[1] * x, labels).mean().item(), [0.0, 1.0], tol=1e-10
    )
    cov = np.cov(x, labels, ddof=0)
    assert found.x[1] == pytest.approx(cov[1, 1] / cov[0, 1], rel=1e-4)
    assert found.x[1] > 1.1 * cov[0, 1] / cov[0, 0]  # the slope of least squares


def test_settings_reach_the_loss():
    overrides = ["task=series", "task.path=lorenz96", "task.channels=[x1]", "task.horizon=2"]
    overrides += ["task.context_length=3", "model.width=8", "technique=regression_losses_suite"]
    run = assemble(compose([*overrides, "task.loss.name=huber", "+task.loss.delta=0.25"]))
    loss = run.objective.loss
    assert isinstance(loss, RegressionLoss)
    assert (loss.name, loss.delta) == ("huber", 0.25)
    batch = run.batches.part(0, 0)
    error = run.objective.predict(batch)["logits"].view_as(batch["labels"]) - batch["labels"]
    expected = torch.where(error.abs() <= 0.25, error**2 / 2, 0.25 * error.abs() - 0.25**2 / 2)
    assert run.objective(batch).total.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_refuses_bad_settings():
    with pytest.raises(ValueError, match=r"no regression loss 'rmsl'.*rmsle"):
        RegressionLoss("rmsl")
    with pytest.raises(ValueError, match=r"^delta"):
        RegressionLoss("huber", delta=0.0)
    with pytest.raises(ValueError, match=r"^quantile"):
        RegressionLoss("quantile", quantile=1.0)
