import numpy as np
import pytest
import torch
from torch import nn

from tasks.losses import cross_entropy, masked_mean
from techniques.data.icons_influence_consensus import (
    influences,
    projection,
    sample_gradients,
    scores,
    targets,
    votes,
)
from tests.conformance.runs import tiny
from training.assemble import assemble
from training.errors import UsageError


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, features):
        return {"logits": self.layers(features)}


def test_gradients_are_those_of_one_sample_at_a_time():
    model = Linear().double()
    model.layers[0].bias.requires_grad_(False)
    batch = {"features": torch.randn(5, 4).double(), "labels": torch.tensor([0, 1, -100, 2, 2])}
    found = sample_gradients(model, cross_entropy, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    for i in range(5):
        single = {name: value[i : i + 1] for name, value in batch.items()}
        outputs = model(single["features"])
        loss = masked_mean(cross_entropy(outputs, single), outputs, single)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
        torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=1e-14)


def test_gradient_of_a_linear_classifier_is_known():
    """(softmax − onehot) ⊗ x."""
    model = nn.Module()
    model.layer = nn.Linear(4, 3, bias=False).double()
    model.forward = lambda features: {"logits": model.layer(features)}
    x, y = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 2, 1])
    found = sample_gradients(model, cross_entropy, {"features": x, "labels": y})
    p = (x @ model.layer.weight.T).softmax(1).detach() - torch.eye(3).double()[y]
    torch.testing.assert_close(found, torch.einsum("nc,nd->ncd", p, x).flatten(1))


def test_projection_is_of_signs_and_keeps_inner_products_in_expectation():
    x = np.random.default_rng(0).normal(size=(2, 50))
    found = []
    for seed in range(400):
        signs = projection(50, 8, seed)
        assert np.unique(np.abs(signs)) == pytest.approx([8**-0.5])
        a, b = x @ signs.T
        found.append(a @ b)
    exact = x[0] @ x[1]
    # Var = (‖a‖²‖b‖² + (a·b)² − 2·Σ a²b²)/dimensions for random signs
    variance = (x[0] @ x[0]) * (x[1] @ x[1]) + exact**2 - 2 * (x[0] ** 2 @ x[1] ** 2)
    assert np.mean(found) == pytest.approx(exact, abs=4 * (variance / 8 / 400) ** 0.5)
    assert np.var(found) == pytest.approx(variance / 8, rel=0.3)


def test_no_projection_where_it_would_not_be_smaller():
    assert projection(8, 8) is None


def test_influence_is_the_mean_cosine():
    rng = np.random.default_rng(0)
    train, targets = rng.normal(size=(6, 5)), rng.normal(size=(3, 5))
    found = influences(train, targets)
    for i in range(6):
        cosines = [train[i] @ t / (train[i] @ train[i]) ** 0.5 / (t @ t) ** 0.5 for t in targets]
        assert found[i] == pytest.approx(sum(cosines) / 3, rel=1e-12)


def test_a_step_on_an_influential_sample_lowers_the_targets_loss_by_as_much():
    """By ‖∇ℓ‖·influence for each unit of length against the sample's gradient."""
    model = Linear().double()
    batch = {"features": torch.randn(3, 4).double(), "labels": torch.tensor([0, 1, 2])}
    gradients = sample_gradients(model, cross_entropy, batch).numpy()
    step = 1e-5

    def loss(weights):
        nn.utils.vector_to_parameters(weights, model.parameters())
        return cross_entropy(model(batch["features"]), batch)[0].item()

    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    for i in (1, 2):
        direction = torch.from_numpy(gradients[i] / np.linalg.norm(gradients[i]))
        lower = (loss(start + step * direction) - loss(start - step * direction)) / (2 * step)
        influence = influences(gradients[i : i + 1], gradients[:1])[0]
        assert lower == pytest.approx(np.linalg.norm(gradients[0]) * influence, rel=1e-6)


def test_votes_count_the_tasks_whose_best_the_sample_is_among():
    scores = np.array([[5.0, 4, 3, 2, 1], [1, 5, 2, 3, 4], [2, 9, 8, 1, 0]])
    assert votes(scores, 0.4).tolist() == [1, 3, 1, 0, 1]
    assert votes(scores, 0.2).tolist() == [1, 2, 0, 0, 0]


def test_votes_are_as_the_authors_code_has_them():
    """`np.percentile(column, 100 - top_percent)` and `>=`."""
    scores = np.random.default_rng(0).normal(size=(7, 101))
    expected = [sum(row[i] >= np.percentile(row, 80) for row in scores) for i in range(101)]
    assert votes(scores, 0.2).tolist() == expected


def test_targets_are_the_values_of_a_column(tmp_path):
    run = assemble(tiny("icons_influence_consensus", tmp_path)[0])
    groups = targets(run.task.validation, "labels", 7)
    assert [set(np.asarray(group["labels"]).tolist()) for group in groups] == [
        {n} for n in range(10)
    ]
    assert {len(group) for group in groups} == {7}
    with pytest.raises(UsageError, match="no column 'label'; did you mean 'labels'"):
        targets(run.task.validation, "label", None)


def test_overlay_keeps_what_has_most_votes(tmp_path):
    found = {}
    for consensus in ("vote", "mean"):
        setting = f"data.transforms.icons.scores.consensus={consensus}"
        run = assemble(tiny("icons_influence_consensus", tmp_path, setting)[0])
        found[consensus] = run.transforms["icons"].selection
    selection = found["vote"]
    values, left = selection.scores.values, np.setdiff1d(np.arange(1437), selection.kept)
    assert len(run.task.train) == len(selection.kept) == int(0.2 * 1437)
    assert values[selection.kept].min() >= values[left].max()
    # each of ten tasks votes for a fifth
    assert values.sum() == pytest.approx(0.2 * 10 * 1437, abs=10)
    assert found["mean"].scores.found  # the influences are the same
    assert np.abs(found["mean"].scores.values).max() <= 1


@pytest.mark.parametrize("bad", [{"fraction": 1.0}, {"consensus": "max"}, {"dimensions": 0}])
def test_refuses_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        scores(None, None, None, column="labels", **bad)
