import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from torch import Tensor, nn

from techniques.penalty.vat import VAT


class Classifier(nn.Module):
    """A model that remembers the last input it saw."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        self.seen = features.detach()
        return {"logits": self.net(features)}


def linear_model(rows: int = 6) -> tuple[Classifier, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Classifier(nn.Linear(5, 4)).double()
    return model, {"features": torch.randn(rows, 5, dtype=torch.float64)}


def mlp(dtype: torch.dtype = torch.float32) -> tuple[Classifier, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5)).to(dtype)
    return Classifier(net), {"features": torch.randn(64, 20, dtype=dtype)}


def penalty(vat: VAT, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    outputs = model(**{k: v for k, v in batch.items() if k != "labels"})
    return vat(model, outputs, batch)


def test_power_iteration_finds_the_largest_eigenvalue_of_the_curvature():
    """For logits Wx the divergence is ½ rᵀWᵀ(diag p − ppᵀ)Wr for small r: at best ½ε²λ_max."""
    model, batch = linear_model()
    weight = model.net.weight.detach()
    p = model(**batch)["logits"].detach().softmax(-1)
    fisher = p.diag_embed() - p[:, :, None] * p[:, None, :]
    largest = torch.linalg.eigvalsh(weight.T @ fisher @ weight)[:, -1]
    found = penalty(VAT(epsilon=1e-3, xi=1e-4, power_iterations=100), model, batch)
    assert found.item() == pytest.approx(0.5e-6 * largest.mean().item(), rel=5e-3)


def test_two_classes_of_one_feature_by_hand():
    """Logits (w·x, 0): r is ±ε, and the penalty the divergence of two Bernoulli distributions."""
    model = Classifier(nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        model.net.weight.copy_(torch.tensor([[1.5], [0.0]]))
    x = 0.4
    p = torch.tensor(1.5 * x, dtype=torch.float64).sigmoid()
    expected = []
    for r in (-2.0, 2.0):
        q = torch.tensor(1.5 * (x + r), dtype=torch.float64).sigmoid()
        expected.append((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).item())
    batch = {"features": torch.full((1, 1), x, dtype=torch.float64)}
    found = penalty(VAT(epsilon=2.0, xi=1e-3), model, batch).item()
    assert min(abs(found - value) / value for value in expected) < 1e-5


def test_more_divergence_than_a_random_direction_and_more_power_iterations_more():
    model, batch = mlp(torch.float64)
    clean = model(**batch)["logits"].log_softmax(-1)
    d = torch.randn(64, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = model(batch["features"] + d / d.norm(dim=1, keepdim=True))["logits"].log_softmax(-1)
    random = F.kl_div(moved, clean, log_target=True, reduction="batchmean")
    once = penalty(VAT(epsilon=1.0, xi=1e-3), model, batch)
    often = penalty(VAT(epsilon=1.0, xi=1e-3, power_iterations=10), model, batch)
    assert 2 * random < once < often


def test_gradient_is_that_of_the_perturbed_prediction_alone():
    """dKL/dz = (q − p) / batch with p and r constant, hence dKL/dW = (q − p)ᵀ(x + r) / batch."""
    model, batch = linear_model()
    p = model(**batch)["logits"].detach().softmax(-1)
    penalty(VAT(epsilon=0.7, xi=1e-3), model, batch).backward()
    r = model.seen - batch["features"]
    torch.testing.assert_close(r.norm(dim=1), torch.full((6,), 0.7).double(), rtol=1e-5, atol=0)
    q = model(model.seen)["logits"].detach().softmax(-1)
    expected = (q - p).T @ (batch["features"] + r) / 6
    torch.testing.assert_close(model.net.weight.grad, expected, rtol=1e-7, atol=1e-10)


class SmallImageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.norm(self.conv(pixel_values)).relu().mean((2, 3)))}


def test_running_averages_see_only_the_clean_batch():
    torch.manual_seed(0)
    model = SmallImageModel()
    batch = {"pixel_values": torch.randn(8, 1, 6, 6), "labels": torch.zeros(8, dtype=torch.int64)}
    outputs = model(batch["pixel_values"])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    value = VAT(xi=1e-2, power_iterations=2)(model, outputs, batch)
    value.backward()
    assert value > 0
    assert model.norm.num_batches_tracked == 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is not None for p in model.parameters())


def test_random_direction_comes_from_the_global_generator():
    model, batch = mlp()
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(penalty(VAT(epsilon=1.0, xi=1e-2), model, batch).item())
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("inference", [torch.no_grad, torch.enable_grad])
def test_autocast_searches_in_float32(inference):
    """A step of 1e-3 vanishes in bfloat16: the direction must be that of full precision."""
    model, batch = mlp()
    vat = VAT(epsilon=1.0, xi=1e-3)
    torch.manual_seed(3)
    exact = penalty(vat, model, batch)
    direction = model.seen - batch["features"]
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16), inference():
        half = penalty(vat, model, batch)
    assert half.dtype == torch.float32
    torch.testing.assert_close(model.seen - batch["features"], direction, rtol=1e-4, atol=1e-4)
    assert half.item() == pytest.approx(exact.item(), rel=0.15)


def test_entropy_minimisation_adds_the_entropy_of_the_prediction():
    model, batch = mlp(torch.float64)
    values = []
    for with_entropy in (False, True):
        torch.manual_seed(4)
        values.append(penalty(VAT(epsilon=1.0, xi=1e-3, entropy=with_entropy), model, batch).item())
    p = model(**batch)["logits"].detach().softmax(-1).numpy()
    assert values[1] - values[0] == pytest.approx(entropy(p, axis=-1).mean(), rel=1e-9)


class Tokens(nn.Module):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": F.one_hot(input_ids, 5).float()}


def test_refuses_tokens():
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"continuous input.*input_ids"):
        penalty(VAT(), Tokens(), batch)


def test_refuses_labels_that_are_no_classes():
    model, batch = linear_model()
    with pytest.raises(ValueError, match="needs a task with classes"):
        penalty(VAT(), model, {**batch, "labels": torch.zeros(6)})


@pytest.mark.parametrize("name", ["epsilon", "xi", "power_iterations"])
def test_refuses_settings_that_are_not_positive(name):
    with pytest.raises(ValueError, match=name):
        VAT(**{name: 0})
