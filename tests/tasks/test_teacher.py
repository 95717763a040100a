import numpy as np
import pytest
import torch

from models.mlp import MLP
from tasks.teacher import Teacher
from training.assemble import assemble
from training.compose import compose


def test_labels_are_a_perceptrons():
    """The same as a torch perceptron of one hidden layer with the teacher's weights."""
    task = Teacher(features=3, width=50, samples=20, validation=10)
    linear = {"activation": torch.nn.ReLU, "norm": torch.nn.Identity, "head": torch.nn.Linear}
    model = MLP(3, 1, width=50, depth=1, **linear).double()
    with torch.no_grad():
        model.layers[0].weight.copy_(torch.tensor(task.weights))
        model.layers[0].bias.copy_(torch.tensor(task.biases))
        model.head.weight.copy_(torch.tensor(task.readout)[None])
        model.head.bias.zero_()
        points = [torch.tensor(part["features"]) for part in (task.train, task.validation)]
        said = [model(features=part.double())["logits"][:, 0] for part in points]
    mean, std = said[0].mean(), said[0].std(correction=0)
    for part, one in zip((task.train, task.validation), said):
        expected = ((one - mean) / std).float()
        torch.testing.assert_close(torch.tensor(part["labels"]), expected, rtol=1e-5, atol=1e-6)


def test_points_and_weights_are_uniform_in_their_cubes():
    task = Teacher(features=5, width=4000, samples=4000, validation=2)
    points = np.array(task.train["features"])
    assert np.abs(points).max() <= 1
    assert points.var() == pytest.approx(1 / 3, rel=0.05)
    assert np.abs(task.weights).max() <= 5**-0.5
    assert task.weights.var() == pytest.approx(1 / 15, rel=0.05)
    assert Teacher(features=5, samples=9, seed=1).train["labels"] != task.train["labels"][:9]


def test_a_run_trains_on_it():
    run = assemble(
        compose(["task=teacher", "task.samples=64", "task.validation=8", "tracker=none"])
    )
    assert run.model.layers[0].in_features == 4
    assert run.batches.part(0, 0)["features"].shape == (32, 4)


def test_refusals():
    with pytest.raises(ValueError, match="must be at least 1, samples 2, got 0, 1024"):
        Teacher(features=0)
