import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasks.arrays import as_dataset
from techniques.callback.sam_long_tail import DeferredReweighting, class_weights
from techniques.gradient.sam import SAM
from techniques.head.sam_long_tail import CosineHead
from techniques.loss.sam_long_tail import LDAMLoss, VSLoss, class_sizes
from techniques.weighting.sam_long_tail import weighted_mean
from tests.cli.invoke import invoke
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

SIZES = [16, 1, 4]


def task(sizes=SIZES):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return SimpleNamespace(dims={"num_classes": len(sizes)}, train=as_dataset({"labels": labels}))


def draw(rows=6, classes=3):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[-1] = -100
    return logits.requires_grad_(), labels


def plain(scores, label):
    return math.log(sum(math.exp(z) for z in scores)) - scores[label]


def test_ldam_against_plain_python():
    """Margins of 0.5, of the smallest class, times (1/n)^¼: a half and 1/√2 of it."""
    logits, labels = draw()
    found = LDAMLoss(task())({"logits": logits}, {"labels": labels})
    margins = [0.25, 0.5, 0.5 / math.sqrt(2)]
    for row, label, value in zip(logits.tolist(), labels.tolist(), found.tolist()):
        if label < 0:
            assert value == 0
            continue
        scores = [30 * (z - margins[j] * (j == label)) for j, z in enumerate(row)]
        assert value == pytest.approx(plain(scores, label), abs=1e-10)


def test_vs_against_plain_python():
    logits, labels = draw()
    found = VSLoss(task())({"logits": logits}, {"labels": labels})
    for row, label, value in zip(logits.tolist(), labels.tolist(), found.tolist()):
        if label >= 0:
            scores = [z / (16 / n) ** 0.3 + math.log(n / 21) for z, n in zip(row, SIZES)]
            assert value == pytest.approx(plain(scores, label), abs=1e-10)


@pytest.mark.parametrize("loss", [LDAMLoss, VSLoss])
def test_gradients_and_saturation(loss):
    logits, labels = draw()
    made = loss(task())
    assert torch.autograd.gradcheck(lambda z: made({"logits": z}, {"labels": labels}), logits)
    far = torch.tensor([[1e4, -1e4, 0.0]] * 3, requires_grad=True)
    value = made({"logits": far}, {"labels": torch.arange(3)}).sum()
    (slope,) = torch.autograd.grad(value, far)
    assert torch.isfinite(value)
    assert torch.isfinite(slope).all()


def test_equal_classes_have_cross_entropy():
    """Without a margin, or with equal sizes, nothing of the long tail is left."""
    logits, labels = draw()
    expected = F.cross_entropy(logits, labels, reduction="none")
    given = {"logits": logits}, {"labels": labels}
    assert torch.allclose(LDAMLoss(task(), margin=0, scale=1)(*given), expected, atol=1e-12)
    assert torch.allclose(VSLoss(task([5, 5, 5]))(*given), expected, atol=1e-12)


def test_head_gives_cosines():
    head = CosineHead(4, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = F.cosine_similarity(x[:, None], head.weight[None], dim=-1)
    assert torch.allclose(head(x), expected, atol=1e-12)
    assert torch.allclose(head.weight.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    assert CosineHead(4, 3)(x.bfloat16()).dtype == torch.float32


def test_class_weights_in_closed_form():
    """At β = 0 all weigh the same; as β → 1 the weight goes to 1/n."""
    sizes = np.array(SIZES, dtype=float)
    assert class_weights(sizes, 0.0) == pytest.approx([1, 1, 1])
    inverse = 1 / sizes
    assert class_weights(sizes, 1 - 1e-9) == pytest.approx(inverse / inverse.mean(), rel=1e-5)
    # 1 + β + … + β^(n−1) is the effective number of n samples.
    effective = np.array([sum(0.9**k for k in range(n)) for n in SIZES])
    assert class_weights(sizes, 0.9) == pytest.approx((1 / effective) / (1 / effective).mean())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_late_steps_have_torchs_class_weighted_mean(accumulate):
    given = ["task=digits", "model.width=8", "technique=sam_long_tail", "tracker=none"]
    run = assemble(compose([*given, f"trainer.accumulate={accumulate}", "trainer.max_steps=10"]))
    reweighting = run.callbacks["reweighting"]
    reweighting.beta = 0.99
    reweighting.on_fit_start(run)
    run.microbatches = run.batches[0]
    for step in (7, 8):
        run.step = step
        reweighting.on_batch(run)
        total = sum(
            (run.objective(batch).total * batch["share"]).item() for batch in run.microbatches
        )
        labels = torch.cat([batch["labels"] for batch in run.microbatches])
        pixels = torch.cat([batch["pixel_values"] for batch in run.microbatches])
        loss = run.objective.loss
        logits = run.model(pixel_values=pixels)["logits"]
        shifted = loss.scale * (logits - F.one_hot(labels, 10) * torch.tensor(loss.margins))
        sizes = np.bincount(run.task.train["labels"][:])
        weights = (1 - 0.99) / (1 - 0.99**sizes) if step == 8 else np.ones(10)
        weight = torch.tensor(weights, dtype=torch.float32)
        assert total == pytest.approx(F.cross_entropy(shifted, labels, weight).item(), rel=1e-5)


def test_settings_reach_the_classes():
    run = assemble(
        compose(
            [
                *("task=digits", "technique=sam_long_tail", "tracker=none", "gradient.rho=0.3"),
                *("task.loss.margin=0.4", "task.loss.scale=20", "callbacks.reweighting.start=0.5"),
                "+data.transforms.tail={_target_:tasks.transforms.long_tail,ratio:20}",
            ]
        )
    )
    assert isinstance(run.gradient, SAM)
    assert run.gradient.rho == 0.3
    assert (run.objective.loss.scale, max(run.objective.loss.margins)) == (20, 0.4)
    assert isinstance(run.callbacks["reweighting"], DeferredReweighting)
    assert run.callbacks["reweighting"].start == 0.5
    assert isinstance(run.model.head, CosineHead)
    sizes = class_sizes(run.task)
    assert (sizes[0], sizes[-1]) == (139, 7)


def test_without_weights_the_mean_is_plain():
    losses, batch = torch.tensor([1.0, 3.0, 9.0]), {"labels": torch.tensor([0, 1, -100])}
    assert weighted_mean(losses, {}, batch) == 2
    batch["weight"] = torch.tensor([3.0, 1.0, 5.0])
    assert weighted_mean(losses, {}, batch) == 1.5


def test_mistakes():
    refused = {
        "margin": lambda: LDAMLoss(task(), margin=-1),
        "scale": lambda: LDAMLoss(task(), scale=0),
        "gamma": lambda: VSLoss(task(), gamma=-1),
        "bias": lambda: CosineHead(2, 2, bias=True),
        "start": lambda: DeferredReweighting(2),
        "beta": lambda: DeferredReweighting(beta=1),
    }
    for name, made in refused.items():
        with pytest.raises(ValueError, match=rf"^{name}"):
            made()
    with pytest.raises(UsageError, match="class 1 has no training sample"):
        class_sizes(task([3, 0, 2]))
    result = invoke("run", "technique=sam_long_tail", "task=modular", "tracker=none")
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1
