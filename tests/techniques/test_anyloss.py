import math

import pytest
import torch
import torch.distributed as dist

from techniques.loss.anyloss import METRICS, AnyLoss
from tests.processes import in_processes
from training.compose import compose


def draw(count=40, spread=0.5):
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    labels = (torch.rand(count, generator=generator) < 0.3).long()
    return logits, labels


def value(loss, logits, labels):
    return loss({"logits": logits}, {"labels": labels}).mean()


def by_loops(metric, logits, labels, beta=1.0, scale=73.0):
    """The paper's definitions, a sample at a time."""
    tp = fp = fn = tn = 0.0
    for (first, second), label in zip(logits.tolist(), labels.tolist()):
        p = math.exp(second) / (math.exp(first) + math.exp(second))
        a = 1 / (1 + math.exp(-scale * (p - 0.5)))
        tp, fn = tp + label * a, fn + label * (1 - a)
        fp, tn = fp + (1 - label) * a, tn + (1 - label) * (1 - a)
    precision, recall, specificity = tp / (tp + fp), tp / (tp + fn), tn / (tn + fp)
    return (
        1
        - {
            "fbeta": (1 + beta**2) * precision * recall / (beta**2 * precision + recall),
            "gmean": math.sqrt(recall * specificity),
            "balanced_accuracy": (recall + specificity) / 2,
            "accuracy": (tp + tn) / (tp + fp + fn + tn),
        }[metric]
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("beta", "scale"), [(1.0, 73.0), (2.0, 5.0)])
def test_is_one_minus_the_metric_of_the_sharpened_probabilities(metric, beta, scale):
    logits, labels = draw()
    loss = AnyLoss(metric, beta, scale)
    losses = loss({"logits": logits}, {"labels": labels})
    assert losses.shape == labels.shape
    assert losses.dtype == torch.float64
    expected = by_loops(metric, logits, labels, beta, scale)
    assert losses.tolist() == pytest.approx([expected] * len(labels), abs=1e-10)


@pytest.mark.parametrize("metric", METRICS)
def test_gradient(metric):
    logits, labels = draw(12)
    loss = AnyLoss(metric)
    assert torch.autograd.gradcheck(lambda x: value(loss, x, labels), logits.requires_grad_())


@pytest.mark.parametrize("metric", METRICS)
def test_steep_sharpening_gives_scikit_learns_metric(metric):
    from sklearn import metrics as peer

    logits, labels = draw(spread=3)
    y, predicted = labels.numpy(), logits.argmax(-1).numpy()
    recalls = peer.recall_score(y, predicted, average=None)
    expected = {
        "fbeta": peer.fbeta_score(y, predicted, beta=1.0),
        "gmean": recalls.prod() ** 0.5,
        "balanced_accuracy": peer.balanced_accuracy_score(y, predicted),
        "accuracy": peer.accuracy_score(y, predicted),
    }[metric]
    assert 1 - value(AnyLoss(metric, scale=1e6), logits, labels).item() == pytest.approx(expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [73.0, 1e4])
def test_saturated_logits(metric, sign, scale):
    """All right: 0; all wrong: 1, and no gradient to leave it by."""
    labels = torch.tensor([0, 1, 1, 0, 0])
    logits = torch.full((5, 2), -1e4)
    logits[torch.arange(5), labels if sign > 0 else 1 - labels] = 1e4
    found = value(AnyLoss(metric, scale=scale), logits.requires_grad_(), labels)
    found.backward()
    assert found.item() == pytest.approx(0 if sign > 0 else 1, abs=1e-6)
    assert (logits.grad == 0).all()


@pytest.mark.parametrize(("metric", "label"), [("fbeta", 0), ("gmean", 0), ("gmean", 1)])
def test_a_batch_that_lacks_a_class_has_the_metric_0_and_no_gradient(metric, label):
    logits, _ = draw()
    found = value(AnyLoss(metric), logits.requires_grad_(), torch.full((40,), label))
    found.backward()
    assert found.item() == 1
    assert (logits.grad == 0).all()


def test_ignored_labels_do_not_count():
    logits, labels = draw()
    some = labels.clone()
    some[::4] = -100
    kept = some != -100
    losses = AnyLoss("gmean")({"logits": logits}, {"labels": some})
    expected = by_loops("gmean", logits[kept], labels[kept])
    assert (losses[~kept] == 0).all()
    assert losses[kept].tolist() == pytest.approx([expected] * int(kept.sum()), abs=1e-10)


def _half(rank):
    """Each process's loss is of both's samples; gradients averaged over the processes are whole."""
    logits, labels = draw()
    whole = logits.clone().requires_grad_()
    value(AnyLoss("gmean").eval(), whole, labels).backward()
    rows = slice(25) if rank == 0 else slice(25, None)
    own = logits[rows].clone().requires_grad_()
    found = value(AnyLoss("gmean"), own, labels[rows])
    assert found.item() == pytest.approx(by_loops("gmean", logits, labels), abs=1e-10)
    share = len(own) / len(logits)
    (found * share * dist.get_world_size()).backward()
    torch.testing.assert_close(own.grad / dist.get_world_size(), whole.grad[rows])


@pytest.mark.slow
def test_processes_count_together():
    in_processes(_half, 2)


def test_composes():
    config = compose(["technique=anyloss", "task=digits", "task.positive=[9]"])["task"]["loss"]
    assert (config["metric"], config["beta"], config["scale"]) == ("fbeta", 1.0, 73.0)


@pytest.mark.parametrize(("key", "wrong"), [("metric", "recall"), ("beta", 0.0), ("scale", -1.0)])
def test_refusals(key, wrong):
    with pytest.raises(ValueError, match=f"^{key}: "):
        AnyLoss(**{key: wrong})
