from collections import Counter

import numpy as np
import pytest

from tasks.digits import Digits
from tasks.fetch import fetch
from tasks.transforms import confused_labels, hide_labels, long_tail, noisy_labels, subset

TRAIN = Digits().train
LABELS = np.array(TRAIN["labels"])


def test_subset_is_the_same_for_a_seed():
    some, again, other = (subset(TRAIN, samples=50, seed=s) for s in (0, 0, 1))
    assert len(some) == 50
    assert some["pixels"] == again["pixels"] != other["pixels"]
    whole = Counter(map(str, TRAIN["pixels"]))
    assert all(whole[row] for row in map(str, some["pixels"]))


def test_long_tail_falls_exponentially():
    """From the smallest class's 139 samples to a twentieth: ln n is a line in the class."""
    tail = long_tail(TRAIN, ratio=20)
    counts = np.bincount(tail["labels"])
    assert counts[0] == np.bincount(LABELS.astype(int)).min()
    assert counts[9] == round(counts[0] / 20)
    assert np.diff(np.log(counts)) == pytest.approx(-np.log(20) / 9, abs=0.07)
    assert tail["pixels"] == long_tail(TRAIN, ratio=20)["pixels"]
    assert tail["pixels"] != long_tail(TRAIN, ratio=20, seed=1)["pixels"]
    with pytest.raises(ValueError, match="ratio: must be at least 1"):
        long_tail(TRAIN, ratio=0.5)


def test_hidden_labels():
    hidden = np.array(hide_labels(TRAIN, keep=50)["labels"])
    kept = hidden != -100
    assert kept.sum() == 50
    assert (hidden[kept] == LABELS[kept]).all()
    assert fetch(hide_labels(TRAIN, keep=50), range(4))["labels"].dtype.is_floating_point is False


def test_noisy_labels_are_right_by_chance():
    """Of the 40% drawn anew from ten classes, a tenth is right: 36% are wrong, give or take."""
    noisy = np.array(noisy_labels(TRAIN, fraction=0.4)["labels"])
    wrong = (noisy != LABELS).mean()
    error = (0.4 * 0.09 / len(LABELS)) ** 0.5
    assert wrong == pytest.approx(0.36, abs=4 * error)
    assert set(noisy) == set(range(10))
    assert (np.array(noisy_labels(TRAIN, fraction=0.0)["labels"]) == LABELS).all()


def test_confused_labels_go_to_one_other_class():
    confused = np.array(confused_labels(TRAIN, fraction=0.4, seed=3)["labels"])
    moved = confused != LABELS
    error = (0.4 * 0.6 / len(LABELS)) ** 0.5
    assert moved.mean() == pytest.approx(0.4, abs=4 * error)
    pairs = dict(zip(LABELS[moved], confused[moved]))
    assert all(pairs[own] == other for own, other in zip(LABELS[moved], confused[moved]))
    part = confused_labels(TRAIN.select(range(400)), fraction=1.0, seed=3)["labels"]
    assert [pairs[own] for own in LABELS[:400]] == list(part)
    with pytest.raises(ValueError, match="at least two classes"):
        confused_labels(TRAIN.select([0, 0]), fraction=0.5)


@pytest.mark.parametrize(
    ("transform", "keys"),
    [
        (subset, {"samples": 0}),
        (subset, {"samples": 10**6}),
        (hide_labels, {"keep": 0}),
        (noisy_labels, {"fraction": 1.5}),
        (confused_labels, {"fraction": -0.1}),
    ],
)
def test_refusals(transform, keys):
    with pytest.raises(ValueError, match=f"^{next(iter(keys))}: expected "):
        transform(TRAIN, **keys)
