import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy, mannwhitneyu

from tasks.bags import Bags
from tasks.digits import Digits
from tasks.fetch import fetch
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.evaluate import evaluate


def everything(task, split="train"):
    dataset = getattr(task, split)
    rows = fetch(dataset, torch.arange(len(dataset)))
    return task.prepare(rows, torch.Generator(), False)


def raw(pixels):
    """The image as scikit-learn has it, as a key."""
    digits = Digits()
    return [tuple(row) for row in (pixels.flatten(1) * digits.std + digits.mean).round().tolist()]


def known(split):
    """Of each image of `Digits` its label."""
    dataset = getattr(Digits(), split)
    rows = fetch(dataset, torch.arange(len(dataset)))
    return dict(zip(map(tuple, rows["pixels"].tolist()), rows["labels"].tolist()))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_bag_is_of_its_splits_digits_and_its_label_says_whether_the_target_is_there(split):
    task = Bags(bags=60, validation_bags=40, target=3, positives=2, mean_size=6, deviation=3)
    batch, labels = everything(task, split), known(split)
    assert len(batch["labels"]) == {"train": 60, "validation": 40}[split]
    assert batch["labels"].float().mean() == 0.5
    sizes = set()
    for pixels, mask, label in zip(
        *(batch[k] for k in ("pixel_values", "attention_mask", "labels"))
    ):
        there = mask.bool()
        digits = [labels[image] for image in raw(pixels[there])]
        assert digits.count(3) == 2 * label
        assert (pixels[~there] == 0).all()
        sizes.add(len(digits))
    assert min(sizes) >= 2
    assert max(sizes) <= batch["pixel_values"].shape[1]
    assert len(sizes) > 4


def test_draws_are_those_of_the_seed():
    first, again, other = (everything(Bags(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert first["pixel_values"].shape != other["pixel_values"].shape or not torch.equal(
        first["pixel_values"], other["pixel_values"]
    )
    sizes = first["attention_mask"].sum(1).double()
    assert sizes.mean().item() == pytest.approx(9.5, abs=0.6)  # rounded down, as the source does
    assert sizes.std().item() == pytest.approx(2, abs=0.5)


def test_auc_is_the_chance_that_a_positive_bag_is_above_a_negative_one():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(50, generator=generator).mul(4).round()  # with ties
    labels = torch.randint(2, (50,), generator=generator)
    auc = Bags().summarise({"score": score, "labels": labels})["auc"]
    positive, negative = score[labels == 1].numpy(), score[labels == 0].numpy()
    expected = mannwhitneyu(positive, negative).statistic / len(positive) / len(negative)
    assert auc == pytest.approx(expected, abs=1e-12)
    alone = Bags().summarise({"score": score[:1], "labels": labels[:1]})["auc"]
    assert math.isnan(alone)


def test_a_run_reports_auc_accuracy_and_entropy():
    run = assemble(compose(["task=bags", "model.width=8", "tracker=none", "trainer.device=cpu"]))
    values = evaluate(run)
    batch = everything(run.task, "validation")
    outputs = run.model(pixel_values=batch["pixel_values"], attention_mask=batch["attention_mask"])
    predicted = outputs["logits"].argmax(1)
    accuracy = (predicted == batch["labels"]).double().mean().item()
    spread = np.mean(entropy(outputs["attention"].detach().numpy(), axis=-1))
    assert values["val/accuracy"] == pytest.approx(accuracy)
    assert values["val/attention_entropy"] == pytest.approx(spread, rel=1e-5)
    assert 0 <= values["val/auc"] <= 1


REFUSED = {
    "bags": {"bags": 1},
    "validation_bags": {"validation_bags": 0},
    "positives": {"positives": 0},
    "target": {"target": 10},
    "mean_size": {"mean_size": 2, "positives": 3},
}


@pytest.mark.parametrize("key", REFUSED)
def test_refusals(key):
    with pytest.raises(UsageError, match=rf"^task\.{key}[:,]"):
        Bags(**REFUSED[key])
