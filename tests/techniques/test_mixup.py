import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest

from tasks import losses
from techniques.data.mixup import MixedLoss, Mixup
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(6, 1, 4, 4, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


class Task:
    loss = staticmethod(losses.cross_entropy)


def mixed(seed=0, alpha=1.0):
    batch = {"pixel_values": IMAGES, "labels": LABELS, "index": torch.arange(6)}
    return Mixup(alpha)(batch, torch.Generator().manual_seed(seed))


def test_each_sample_is_mixed_with_the_one_whose_label_it_gets():
    found = mixed(seed=2)
    share = found["mix"].double()
    assert found["labels"].equal(LABELS)
    assert found["index"].equal(torch.arange(6))
    others = (found["pixel_values"] - share * IMAGES) / (1 - share)
    places = [
        int((IMAGES - other).abs().amax((1, 2, 3)).argmin()) for other in others
    ]  # to which image each is equal
    assert sorted(places) == list(range(6))
    torch.testing.assert_close(others, IMAGES[places], rtol=1e-5, atol=1e-5)
    assert found["other_labels"].equal(LABELS[places])
    assert mixed(seed=2)["pixel_values"].equal(found["pixel_values"])
    assert mixed(seed=3)["mix"] != found["mix"]


@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_shares_have_the_beta_distribution(alpha):
    shares = [float(mixed(seed, alpha)["mix"]) for seed in range(500)]
    assert kstest(shares, "beta", (alpha, alpha)).pvalue > 1e-3


def test_loss_is_that_of_soft_labels():
    logits = torch.randn(6, 3, generator=GENERATOR, dtype=torch.float64)
    batch = {**mixed(), "mix": torch.tensor(0.3, dtype=torch.float64)}
    first, second = (F.one_hot(batch[n], 3).double() for n in ("labels", "other_labels"))
    soft = 0.3 * first + 0.7 * second
    found = MixedLoss(Task())({"logits": logits}, batch)
    expected = F.cross_entropy(logits, soft, reduction="none")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    plain = MixedLoss(Task())({"logits": logits}, {"labels": LABELS})
    assert plain.equal(F.cross_entropy(logits, LABELS, reduction="none"))


def test_composes_and_only_training_batches_are_mixed():
    names = ["task=digits", "model.width=8", "tracker=none", "trainer.device=cpu"]
    names.append("+data.batch.mixup={_target_:techniques.data.mixup.Mixup,alpha:0.5}")
    names.append("task.loss={_target_:techniques.data.mixup.MixedLoss}")
    run = assemble(compose(names))
    assert run.batches.transforms[0].alpha == 0.5
    batch = run.batches[0][0]
    assert batch["other_labels"].shape == batch["labels"].shape
    losses = run.objective(batch)
    outputs = run.model(pixel_values=batch["pixel_values"])
    both = [F.cross_entropy(outputs["logits"], batch[n]) for n in ("labels", "other_labels")]
    torch.testing.assert_close(
        losses.total, batch["mix"] * both[0] + (1 - batch["mix"]) * both[1], rtol=1e-5, atol=1e-6
    )


def test_refusals():
    with pytest.raises(ValueError, match=r"^alpha: must be positive, got 0"):
        Mixup(0)
    with pytest.raises(UsageError, match="mixup needs one of pixel_values"):
        Mixup()({"input_ids": LABELS, "labels": LABELS}, GENERATOR)
