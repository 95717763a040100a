import math
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.neighbors import NearestCentroid

from tasks.digits import Digits
from tasks.fetch import fetch
from tasks.metric_learning import (
    EPISODES,
    Balanced,
    MetricLearning,
    NormalisedSoftmax,
    batch_hard_triplet,
    few_shot,
    retrieval,
    supcon,
)
from tests.processes import in_processes
from tests.tasks.test_others import pictures
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.evaluate import evaluate


def draw(rows=9, dim=5, classes=3):
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return found, torch.randint(classes, (rows,), generator=generator)


def everything(task, split, training=False):
    dataset = getattr(task, split)
    rows = fetch(dataset, torch.arange(len(dataset)))
    return task.prepare(rows, torch.Generator().manual_seed(0), training)


def test_validation_has_the_classes_that_training_has_not():
    task = MetricLearning(train_classes=6, embedding=7)
    train, validation = everything(task, "train"), everything(task, "validation")
    assert train["labels"].unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert validation["labels"].unique().tolist() == [6, 7, 8, 9]
    assert len(train["labels"]) + len(validation["labels"]) == 1797
    assert train["pixel_values"].shape[1:] == (1, 8, 8)
    assert all(len(part.unique()) > 1 for part in validation["labels"].split(32))
    assert (task.dims["num_classes"], task.dims["in_features"]) == (7, 64)


def test_views_are_of_the_same_images_and_only_in_training():
    task = MetricLearning(views=2)
    train, validation = everything(task, "train", True), everything(task, "validation")
    half = len(task.train)
    assert len(train["pixel_values"]) == len(train["labels"]) == 2 * half
    assert torch.equal(train["labels"][:half], train["labels"][half:])
    first, second = train["pixel_values"].flatten(1).split(half)
    same, other = (F.cosine_similarity(first, x) for x in (second, second.roll(1, 0)))
    assert (same > other).float().mean() > 0.6
    assert len(validation["labels"]) == len(task.validation)


def test_a_background_fills_the_dark_of_validation_images_alone():
    plain, noisy = MetricLearning(), MetricLearning(background=0.5)
    assert torch.equal(
        *(everything(task, "train", True)["pixel_values"] for task in (plain, noisy))
    )
    digits = Digits()
    before, after = (
        everything(task, "validation")["pixel_values"] * digits.std + digits.mean
        for task in (plain, noisy)
    )
    assert (after >= before - 1e-4).all()
    dark = after[before.round() == 0]
    assert dark.max() <= 8
    assert dark.mean().item() == pytest.approx(4, abs=0.05)
    bright = before > 8.1
    torch.testing.assert_close(after[bright], before[bright])


def test_image_folder(tmp_path):
    path = pictures(tmp_path / "pets")
    for split in ("train", "test"):
        shutil.copytree(tmp_path / "pets" / split / "dog", tmp_path / "pets" / split / "eel")
    task = MetricLearning(path=path, train_classes=2, background=0.3)
    assert (len(task.train), len(task.validation)) == (24, 12)
    batch = everything(task, "validation")
    assert batch["pixel_values"].shape == (12, 3, 12, 12)
    assert (batch["labels"] == 2).all()


def by_hand(found, labels, at):
    """Neighbours one sample at a time, in plain Python."""
    unit = found / found.norm(dim=1, keepdim=True)
    recalls, precisions = [], []
    for i, label in enumerate(labels):
        order = sorted((-float(unit[i] @ unit[j]), j) for j in range(len(labels)) if j != i)
        hits = [bool(labels[j] == label) for _, j in order]
        r = sum(hits)
        if r == 0:
            continue
        recalls.append([any(hits[:k]) for k in at])
        right = [sum(hits[: n + 1]) / (n + 1) for n in range(r) if hits[n]]
        precisions.append(sum(right) / r)
    return [*np.mean(recalls, axis=0), np.mean(precisions)]


def test_retrieval_is_the_definition():
    found, labels = draw(60, 4, 7)
    labels[3] = 99  # the only one of its class
    at = (1, 2, 5, 100)
    values = retrieval(F.normalize(found, dim=1), labels, at)
    assert list(values) == [
        "recall_at_1",
        "recall_at_2",
        "recall_at_5",
        "recall_at_100",
        "map_at_r",
    ]
    assert list(values.values()) == pytest.approx(by_hand(found, labels, at), abs=1e-12)


def test_few_shot_accuracy_is_that_of_nearest_centroids():
    found, labels = draw(40, 4, 3)
    generator = torch.Generator().manual_seed(0)
    expected = []
    for _ in range(EPISODES):
        order = torch.randperm(40, generator=generator).tolist()
        support = [i for c in range(3) for i in [i for i in order if labels[i] == c][:2]]
        asked = [i for i in range(40) if i not in support]
        nearest = NearestCentroid().fit(found[support].numpy(), labels[support].numpy())
        expected.append(nearest.score(found[asked].numpy(), labels[asked].numpy()))
    assert few_shot(found, labels, shots=2) == pytest.approx(np.mean(expected), abs=1e-12)


def test_one_sample_has_names_and_no_values():
    task = MetricLearning()
    values = task.summarise({"embeddings": torch.ones(1, 3), "labels": torch.tensor([7])})
    assert list(values) == [*(f"recall_at_{k}" for k in task.at), "map_at_r", "few_shot_accuracy"]
    assert all(math.isnan(value) for value in values.values())


def test_sampler_gives_each_batch_some_samples_of_some_classes():
    task = MetricLearning()
    labels = torch.tensor(task.train["labels"])
    sampler = Balanced(len(labels), 0, task=task, samples=4)
    order = sampler.indices(3)
    assert len(order) == sampler.length == math.ceil(len(labels) / 20) * 20
    for part in labels[order].split(20):
        assert part.unique(return_counts=True)[1].tolist() == [4] * 5
        assert (part.view(5, 4) == part.view(5, 4)[:, :1]).all()
    assert torch.equal(order, sampler.indices(3))
    assert not torch.equal(order, sampler.indices(4))
    assert len(order.unique()) > 0.95 * len(order)
    # A class of three samples fills its groups again and again.
    rare = torch.cat(
        [torch.nonzero(labels == 0).flatten()[:3], torch.nonzero(labels == 1).flatten()]
    )
    few = type("Task", (), {"train": task.train.select(rare.tolist())})()
    found = torch.tensor(few.train["labels"])[Balanced(len(rare), 0, task=few).indices(0)]
    assert found.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_run_with_the_sampler_reports_retrieval():
    config = compose(
        [
            *("task=metric_learning", "model.width=8", "trainer.batch_size=20", "tracker=none"),
            *("data.sampler._target_=tasks.metric_learning.Balanced", "+data.sampler.samples=10"),
            *("task.at=[1]", "task.features=hidden", "trainer.device=cpu"),
        ]
    )
    run = assemble(config)
    assert len(run.batches.part(0, 0)["labels"].unique()) == 2
    values = evaluate(run, 50)
    assert sorted(values) == [
        "val/few_shot_accuracy",
        "val/loss",
        "val/map_at_r",
        "val/recall_at_1",
    ]
    rows = fetch(run.task.validation, torch.arange(50) * len(run.task.validation) // 50)
    batch = run.task.prepare(rows, torch.Generator(), False)
    hidden = run.model(pixel_values=batch["pixel_values"])["hidden"].detach()
    expected = by_hand(hidden, batch["labels"], (1,))
    assert values["val/recall_at_1"] == pytest.approx(expected[0])
    assert values["val/map_at_r"] == pytest.approx(expected[1], abs=1e-6)


def test_batch_hard_triplet_is_the_definition():
    found, labels = draw()
    labels[[2, 5]] = torch.tensor([77, -100])  # alone, and of no class
    unit = F.normalize(found, dim=1)
    losses = batch_hard_triplet({"logits": 3 * found}, {"labels": labels}, margin=0.7)
    for i in range(9):
        distances = [(unit[i] - unit[j]).norm().item() for j in range(9)]
        others = [j for j in range(9) if j not in (i, 5)]
        same = [distances[j] for j in others if labels[j] == labels[i]]
        different = [distances[j] for j in others if labels[j] != labels[i]]
        expected = max(0.0, 0.7 + max(same) - min(different)) if same and i != 5 else 0.0
        assert losses[i].item() == pytest.approx(expected, abs=1e-10)


def test_supcon_is_the_definition():
    found, labels = draw()
    labels[[2, 5]] = torch.tensor([77, -100])
    unit = F.normalize(found, dim=1)
    losses = supcon({"logits": found}, {"labels": labels}, temperature=0.3)
    for i in range(9):
        others = [j for j in range(9) if j not in (i, 5)]
        z = {j: (unit[i] @ unit[j]).item() / 0.3 for j in others}
        same = [j for j in others if labels[j] == labels[i]]
        below = math.log(sum(math.exp(v) for v in z.values()))
        expected = -sum(z[j] - below for j in same) / len(same) if same and i != 5 else 0.0
        assert losses[i].item() == pytest.approx(expected, abs=1e-10)


def test_normalised_softmax_is_the_cross_entropy_of_cosines():
    found, labels = draw()
    labels[4] = -100
    loss = NormalisedSoftmax(3, 5).double()
    losses = loss({"logits": found}, {"labels": labels})
    for i in range(9):
        cosines = [F.cosine_similarity(found[i], w, dim=0).item() / 0.05 for w in loss.weight]
        below = math.log(sum(math.exp(c) for c in cosines))
        expected = 0.0 if i == 4 else below - cosines[labels[i]]
        assert losses[i].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("loss", [batch_hard_triplet, supcon, NormalisedSoftmax(3, 5).double()])
def test_gradients(loss):
    found, labels = draw()
    labels[5] = -100
    assert torch.autograd.gradcheck(
        lambda x: loss({"logits": x}, {"labels": labels}), found.requires_grad_()
    )
    for scale in (1e4, 0.0):
        far = (scale * found.detach().float().sign()).requires_grad_()
        losses = loss.float() if isinstance(loss, torch.nn.Module) else loss
        value = losses({"logits": far}, {"labels": labels})
        value.sum().backward()
        assert value.isfinite().all()
        assert far.grad.isfinite().all()


def _half(rank: int) -> None:
    """Rows 0 to 4 in one process and 5 to 8 in the other: the losses and gradients of one."""
    found, labels = draw()
    parts = [slice(0, 5), slice(5, 9)][rank]
    for loss in (batch_hard_triplet, supcon):
        whole = found.clone().requires_grad_()
        with torch.no_grad():
            alone = loss({"logits": found}, {"labels": labels})
        own = found[parts].clone().requires_grad_()
        losses = loss({"logits": own}, {"labels": labels[parts]})
        torch.testing.assert_close(losses.detach(), alone[parts])
        losses.sum().backward()
        # In evaluation each is alone, so one process's gradient is made by central differences.
        for i in range(own.numel()):
            values = []
            for step in (1e-6, -1e-6):
                moved = whole.detach().clone()
                moved[parts].view(-1)[i] += step
                with torch.no_grad():
                    values.append(loss({"logits": moved}, {"labels": labels}).sum())
            expected = (values[0] - values[1]) / 2e-6
            torch.testing.assert_close(own.grad.view(-1)[i], expected, rtol=1e-5, atol=1e-7)
    assert dist.get_world_size() == 2


@pytest.mark.slow
def test_processes_see_each_others_samples():
    in_processes(_half, 2)


REFUSED = {
    "train_classes": {"train_classes": 10},
    "embedding": {"embedding": 0},
    "features": {"features": "head"},
    "background": {"background": 1.5},
    "at": {"at": ()},
    "shots": {"shots": 0},
    "views": {"views": -1},
}


@pytest.mark.parametrize("key", REFUSED)
def test_refusals(key):
    with pytest.raises(UsageError, match=rf"^task\.{key}: "):
        MetricLearning(**REFUSED[key])


def test_refusals_of_losses_and_sampler():
    found, labels = draw()
    with pytest.raises(ValueError, match=r"^temperature: "):
        supcon({"logits": found}, {"labels": labels}, temperature=0)
    with pytest.raises(ValueError, match=r"^temperature: "):
        NormalisedSoftmax(3, 5, temperature=0)
    with pytest.raises(ValueError, match=r"^samples: "):
        Balanced(10, 0, task=MetricLearning(), samples=0)
