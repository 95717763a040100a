import math

import numpy as np
import pytest
import torch

from tasks.binary import margins, metrics, predictions
from tasks.digits import Digits
from tasks.tabular import Tabular
from training.errors import UsageError


def test_metrics_are_those_of_the_confusion_matrix():
    """Of 3 positives 2 are found, of 7 negatives 6 are left alone."""
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    predicted = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 0, 0])
    found = metrics({"labels": labels, "predicted": predicted})
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 6 / 7) / 2)
    assert found["gmean"] == pytest.approx(math.sqrt(2 / 3 * 6 / 7))


@pytest.mark.parametrize("label", [0, 1])
def test_of_one_sample(label):
    found = metrics({"labels": torch.tensor([label]), "predicted": torch.tensor([label])})
    assert found == {"f1": label, "balanced_accuracy": 0.5, "gmean": 0}


def test_margins():
    logits = torch.tensor([[1.0, 3.0], [2.0, -1.0]], dtype=torch.bfloat16)
    found = margins({"logits": logits})
    assert found.dtype == torch.float32
    assert found.tolist() == [2, -3]
    with pytest.raises(ValueError, match="two classes, the model gives 10"):
        margins({"logits": torch.zeros(3, 10)})


def test_some_digits_against_the_others():
    whole, nines = Digits(), Digits(positive=[9])
    assert nines.dims["num_classes"] == nines.dims["out_features"] == 2
    for split in ("train", "validation"):
        digits, labels = (np.array(getattr(t, split)["labels"]) for t in (whole, nines))
        assert (labels == (digits == 9)).all()
        assert labels.mean() == pytest.approx(0.1, abs=0.01)
        assert getattr(nines, split)["pixels"] == getattr(whole, split)["pixels"]


@pytest.mark.parametrize("positive", [9, [], [10], list(range(10))])
def test_refuses_positives_that_are_not_some_digits(positive):
    with pytest.raises(UsageError, match=r"task\.positive"):
        Digits(positive=positive)


def test_two_classes_are_summarised_and_others_not():
    outputs = {"logits": torch.tensor([[0.0, 1.0], [1.0, 0.0]])}
    batch = {"labels": torch.tensor([1, 1])}
    names = {"f1", "balanced_accuracy", "gmean"}
    for task in (Digits(positive=[9]), Tabular(path="breast_cancer")):
        rows = task.collect(outputs, batch)
        assert rows["predicted"].equal(predictions(outputs, batch)["predicted"])
        assert set(task.summarise(rows)) == names
    tasks = (Digits(), Tabular(path="iris"), Tabular(path="diabetes"))
    for task in (*tasks, Digits(positive=[9], objective="reconstruction")):
        assert task.summarise(task.collect(outputs, batch)) == {}
