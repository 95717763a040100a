import math

import pytest
import torch
from scipy.optimize import minimize

from techniques.loss.aldr_loss import ALDRLoss, LDRLoss, robust_loss
from training.compose import compose
from training.errors import UsageError


def draw(rows: int = 12, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (rows,), generator=generator)


def softplus_scores(row: list[float]) -> list[float]:
    positive = [math.log1p(math.exp(z)) for z in row]
    return [p * len(row) / sum(positive) for p in positive]


def l1_scores(row: list[float]) -> list[float]:
    return [z * len(row) / sum(abs(z) for z in row) for z in row]


def worst_case(scores: list[float], label: int, margin: float, temperature: float) -> float:
    terms = [s - scores[label] + margin * (k != label) for k, s in enumerate(scores)]
    return temperature * math.log(sum(math.exp(t / temperature) for t in terms) / len(terms))


def adapted(scores: list[float], previous: float, start: float, alpha: float) -> float:
    """The code's update, one sample at a time."""
    weights = [math.exp(s / previous) for s in scores]
    p = [w / sum(weights) + 1e-5 for w in weights]
    p = [q / sum(p) for q in p]
    divergence = sum(q * math.log(len(p) * q) for q in p)
    return start - start * divergence / (alpha * math.log(len(p)))


@pytest.mark.parametrize(("margin", "temperature"), [(0.1, 10.0), (2.0, 1.0), (0.0, 0.1)])
def test_ldr_is_the_authors_code_one_sample_at_a_time(margin, temperature):
    logits, labels = draw()
    losses = LDRLoss(margin, temperature)({"logits": logits}, {"labels": labels})
    expected = [
        worst_case(softplus_scores(row), label, margin, temperature)
        for row, label in zip(logits.tolist(), labels.tolist())
    ]
    torch.testing.assert_close(
        losses, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("softplus", [False, True])
def test_aldr_is_the_authors_code_over_three_visits(softplus):
    logits, labels = draw()
    start, alpha, margin = 1.5, 2.0, 0.3
    loss = ALDRLoss(margin, start, alpha, softplus)
    kept = [start] * len(logits)
    weight = alpha * math.log(logits.shape[1]) / start
    for visit in range(3):
        found = loss(
            {"logits": (visit + 1) * logits + visit},
            {"labels": labels, "index": torch.arange(len(logits))},
        )
        for i, (row, label) in enumerate(zip(logits.tolist(), labels.tolist())):
            row = [(visit + 1) * z + visit for z in row]
            scores = softplus_scores(row) if softplus else l1_scores(row)
            kept[i] = adapted(scores, kept[i], start, alpha)
            expected = worst_case(scores, label, margin, kept[i])
            expected -= weight / 2 * (kept[i] - start) ** 2
            assert found[i].item() == pytest.approx(expected, abs=1e-10)
    assert loss.temperatures.tolist() == pytest.approx(kept, abs=1e-10)
    assert start * (1 - 1 / alpha) < min(kept) < max(kept) < start


def test_is_the_worst_case_over_label_distributions():
    """No distribution p has a larger E_p[gap] − λ·KL(p ‖ uniform), and one has the same."""
    logits, labels = draw(rows=1)
    temperature, margin = 0.7, 0.4
    value = robust_loss(logits, labels, margin, temperature).item()
    gaps = logits[0] - logits[0, labels[0]] + margin
    gaps[labels[0]] = 0

    def objective(p):
        return (p @ gaps - temperature * (p * (5 * p).log()).sum()).item()

    assert objective((gaps / temperature).softmax(-1)) == pytest.approx(value, abs=1e-10)
    for p in torch.distributions.Dirichlet(torch.ones(5, dtype=torch.float64)).sample((200,)):
        assert objective(p) < value


def test_temperature_goes_from_the_largest_to_the_mean_violation():
    logits, labels = draw()
    gaps = logits - logits.gather(1, labels[:, None]) + 0.5
    gaps = gaps.scatter(1, labels[:, None], 0.0)
    cold, hot = (robust_loss(logits, labels, 0.5, t) for t in (1e-4, 1e6))
    torch.testing.assert_close(cold, gaps.amax(1), rtol=0, atol=2e-4)
    torch.testing.assert_close(hot, gaps.mean(1), rtol=0, atol=1e-4)


def test_gradients():
    logits, labels = draw(rows=4)
    logits[0] -= 30  # where softplus is an exponential
    logits.requires_grad_()
    batch = {"labels": labels}
    for loss in (LDRLoss(), LDRLoss(1.0, 0.5), ALDRLoss(alpha=1e12)):
        assert torch.autograd.gradcheck(lambda z, f=loss: f({"logits": z}, batch), logits)


def test_no_gradient_flows_through_the_temperature():
    logits, labels = draw()
    logits.requires_grad_()
    loss = ALDRLoss(0.2, 1.0)
    batch = {"labels": labels, "index": torch.arange(len(logits))}
    (found,) = torch.autograd.grad(loss({"logits": logits}, batch).sum(), logits)
    scores = 5 * logits / logits.abs().sum(1, keepdim=True)
    fixed = robust_loss(scores, labels, 0.2, loss.temperatures)
    (expected,) = torch.autograd.grad(fixed.sum(), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_minimiser():
    """softmax(s / λ) = P(k|x) where no score is negative; else the order of P is kept."""
    near = torch.tensor([0.21, 0.195, 0.2, 0.205, 0.19], dtype=torch.float64)
    far = torch.tensor([0.5, 0.05, 0.25, 0.15, 0.05], dtype=torch.float64)
    for q, margin in ((near, 0.0), (far, 0.0), (near, 0.1), (far, 0.1)):

        def risk(z, q=q, margin=margin):
            z = torch.tensor(z, requires_grad=True)
            loss = LDRLoss(margin)({"logits": z.expand(5, 5)}, {"labels": torch.arange(5)})
            value = q @ loss
            value.backward()
            return value.item(), z.grad.numpy()

        z = torch.tensor(minimize(risk, [0.3, 0.1, 0.0, 0.2, 0.0], jac=True, tol=1e-12).x)
        scores = 5 * torch.nn.functional.softplus(z) / torch.nn.functional.softplus(z).sum()
        if q is near and not margin:
            torch.testing.assert_close((scores / 10).softmax(-1), q, rtol=0, atol=1e-5)
        assert scores.argmax() == q.argmax()
        if q is near:
            assert scores.argsort().equal(q.argsort())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss", [LDRLoss(), ALDRLoss(), ALDRLoss(softplus=True)])
def test_saturated_logits(loss, dtype):
    rows = [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [-1e4, 1e4, 1e4], [1e4, 0.0, 0.0]]
    logits = torch.tensor(rows, dtype=dtype).requires_grad_()
    for label in range(3):
        losses = loss({"logits": logits}, {"labels": torch.full((4,), label)})
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert losses.isfinite().all()
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert gradient.isfinite().all()


def test_range():
    """The ends, at λ = 10 and c = 0.1 with three classes, from scores (3, 0, 0)."""
    logits = torch.tensor([[1e4, -1e4, -1e4]], dtype=torch.float64)
    best, worst = (
        LDRLoss()({"logits": logits}, {"labels": torch.tensor([label])}).item() for label in (0, 1)
    )
    assert best == pytest.approx(10 * math.log((1 + 2 * math.exp(-0.29)) / 3), abs=1e-10)
    high = math.log((1 + math.exp(0.01) + math.exp(0.31)) / 3)
    assert worst == pytest.approx(10 * high, abs=1e-10)


def test_temperatures_belong_to_samples_and_are_in_the_state():
    logits, labels = draw(rows=3)
    loss = ALDRLoss(temperature=1.0)
    loss({"logits": logits}, {"labels": labels, "index": torch.tensor([7, 2, 4])})
    assert len(loss.temperatures) == 8
    assert (loss.temperatures[[0, 1, 3, 5, 6]] == 1).all()
    assert (loss.temperatures[[7, 2, 4]] < 1).all()
    again = ALDRLoss(temperature=1.0)
    again.load_state_dict(loss.state_dict())
    batch = {"labels": labels, "index": torch.tensor([4, 9, 7])}
    assert torch.equal(again({"logits": logits}, batch), loss({"logits": logits}, batch))

    before = loss.temperatures.clone()
    fresh = ALDRLoss(temperature=1.0)
    values = loss.eval()({"logits": logits}, batch)
    assert torch.equal(values, fresh({"logits": logits}, {"labels": labels}))
    assert torch.equal(loss.temperatures, before)
    assert not len(fresh.temperatures)


def test_processes_know_the_temperatures_of_all(monkeypatch):
    """Another process has samples 5 and 11; its λ are kept here too."""
    logits, labels = draw(rows=2)
    other = (torch.tensor([5, 11]), torch.tensor([0.25, 0.75], dtype=torch.float64))

    def gather(parts, own):
        parts[:] = [own, other]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    loss = ALDRLoss(temperature=1.0)
    batch = {"labels": labels, "index": torch.tensor([3, 0])}
    loss({"logits": logits.requires_grad_()}, batch)
    assert loss.temperatures[[5, 11]].tolist() == [0.25, 0.75]
    assert (loss.temperatures[[0, 3]] < 1).all()
    assert len(loss.temperatures) == 12


def test_logits_of_zero_have_no_nan():
    logits = torch.zeros(2, 4, requires_grad=True)
    loss = ALDRLoss(margin=0.0)({"logits": logits}, {"labels": torch.tensor([0, 3])})
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0, 0], abs=1e-5)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [LDRLoss(), ALDRLoss()])
def test_ignored_labels_have_no_loss(loss):
    logits, labels = draw()
    labels[::2] = -100
    logits.requires_grad_()
    losses = loss({"logits": logits}, {"labels": labels})
    losses.sum().backward()
    assert (losses[::2] == 0).all()
    assert (logits.grad[::2] == 0).all()
    assert (losses[1::2] != 0).all()


def test_settings_reach_the_class():
    loss = compose(["task=digits", "technique=aldr_loss", "task.loss.margin=0.3"])["task"]["loss"]
    assert (loss["margin"], loss["temperature"]) == (0.3, 10.0)


@pytest.mark.parametrize(
    ("setting", "value"), [("margin", -0.1), ("temperature", 0.0), ("alpha", 1.0)]
)
def test_refuses_settings_out_of_range(setting, value):
    with pytest.raises(ValueError, match=setting):
        ALDRLoss(**{setting: value})


def test_refuses_labels_of_tokens():
    outputs, batch = {"logits": torch.randn(2, 3, 5)}, {"labels": torch.zeros(2, 3).long()}
    with pytest.raises(UsageError, match="one label per sample"):
        ALDRLoss()(outputs, batch)
