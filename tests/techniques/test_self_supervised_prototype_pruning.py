import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn

from techniques.data.self_supervised_prototype_pruning import (
    PrototypePruning,
    balanced,
    error_norms,
    prototype_distances,
)
from tests.conformance.runs import tiny
from training.assemble import assemble
from training.errors import UsageError


def blobs(angles, radii):
    """Points of the plane at angles in degrees and radii."""
    angles = np.radians(angles)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.array(radii)[:, None]


def test_is_the_cosine_distance_to_the_clusters_mean_direction():
    """Two clusters of three directions each: their middle ones are the prototypes' directions,
    whatever the lengths of the embeddings."""
    found = prototype_distances(blobs([0, 10, 20, 170, 180, 190], [1, 5, 2, 1, 9, 3]), 2)
    off = 1 - np.cos(np.radians(10))
    np.testing.assert_allclose(found, [off, 0, off, off, 0, off], atol=1e-12)


def test_is_by_scipy():
    x = np.random.default_rng(0).normal(size=(40, 6))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    found = prototype_distances(x, 1)
    expected = cdist(x, unit.mean(0, keepdims=True), "cosine")[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_cluster_for_each_sample_leaves_no_distance():
    x = np.random.default_rng(0).normal(size=(12, 3))
    np.testing.assert_allclose(prototype_distances(x, 12), 0, atol=1e-12)


def by_hand(scores, classes, keep, balance):
    """Greedy, one sample at a time."""
    names = sorted(set(classes))
    quota = int(balance * keep / len(names))
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept = []
    for name in names:
        kept += [i for i in ranked if classes[i] == name][:quota]
    for i in ranked:
        if i not in kept and len(kept) < keep:
            kept.append(i)
    return sorted(kept)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 7, 20, 39])
def test_class_balance(balance, keep):
    rng = np.random.default_rng(1)
    classes = rng.choice(3, p=[0.7, 0.25, 0.05], size=40)
    scores = rng.normal(size=40).round(1) + classes
    found = balanced(scores, classes, keep, balance)
    assert found.tolist() == by_hand(scores, classes, keep, balance)
    assert len(found) == keep


def test_without_balance_classes_can_vanish_and_with_all_of_it_they_are_equal():
    scores, classes = np.arange(40.0), np.repeat([0, 1], 20)
    assert set(classes[balanced(scores, classes, 10, 0.0)]) == {1}
    assert np.bincount(classes[balanced(scores, classes, 10, 0.5)]).tolist() == [2, 8]
    assert np.bincount(classes[balanced(scores, classes, 10, 1.0)]).tolist() == [5, 5]


def test_el2n_is_the_norm_of_the_error():
    """Of two logits a and b: √2·σ(b − a) where the first is right."""
    model = nn.Module()
    model.forward = lambda features: {"logits": features}
    x = torch.tensor([[2.0, 0.5], [-1.0, 3.0]], dtype=torch.float64)
    found = error_norms(model)({"features": x, "labels": torch.tensor([0, 0])})
    expected = 2**0.5 * torch.sigmoid(x[:, 1] - x[:, 0])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_overlay_keeps_the_hardest_or_the_easiest(tmp_path):
    kept = {}
    for keep in ("highest", "lowest"):
        settings = [f"data.transforms.prototypes.{key}" for key in (f"keep={keep}", "balance=0")]
        run = assemble(tiny("self_supervised_prototype_pruning", tmp_path, *settings)[0])
        selection = run.transforms["prototypes"].selection
        kept[keep] = selection.kept
        assert len(run.task.train) == len(selection.kept) == int(0.7 * 1437)
    scores, left = selection.scores.values, np.setdiff1d(np.arange(1437), kept["highest"])
    assert scores[kept["highest"]].min() >= scores[left].max()
    assert scores[kept["lowest"]].mean() < scores.mean() < scores[kept["highest"]].mean()


def test_refusals(tmp_path):
    for bad in ({"fraction": 0.0}, {"keep": "hard"}, {"balance": 2.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PrototypePruning(**{"fraction": 0.5, "clusters": 2} | bad)
    with pytest.raises(ValueError, match="clusters"):
        prototype_distances(np.ones((3, 2)), 4)
    column = "+data.transforms.prototypes.column=label"
    with pytest.raises(UsageError, match="no column 'label'; did you mean 'labels'"):
        assemble(tiny("self_supervised_prototype_pruning", tmp_path, column)[0])
