import math

import pytest
import torch
import torch.nn.functional as F

from techniques.loss.protoclr import ProtoCLR
from training.assemble import assemble
from training.compose import compose


def draw(rows=9, dim=4, classes=3):
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return found, torch.randint(classes, (rows,), generator=generator)


def losses(found, labels, **keys):
    return ProtoCLR(**keys)({"logits": found}, {"labels": labels})


def by_hand(found, labels, temperature):
    """The authors' loss, one number at a time."""
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in found.tolist()]
    prototypes = {}
    for label in set(labels.tolist()):
        members = [z for z, y in zip(unit, labels.tolist()) if y == label]
        prototypes[label] = [sum(column) / len(members) for column in zip(*members)]
    rows = []
    for z, label in zip(unit, labels.tolist()):
        dots = {k: sum(a * b for a, b in zip(z, c)) / temperature for k, c in prototypes.items()}
        rows.append(math.log(sum(math.exp(v) for v in dots.values())) - dots[label])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_is_the_authors_loss(temperature):
    found, labels = draw()
    value = losses(5 * found, 10 * labels - 3, temperature=temperature)  # labels may be any
    torch.testing.assert_close(value, by_hand(found, labels, temperature), rtol=1e-10, atol=1e-10)


def test_ignored_labels_take_no_part():
    found, labels = draw()
    labels[[1, 4]] = -100
    value = losses(found, labels)
    kept = labels != -100
    expected = by_hand(found[kept], labels[kept], 0.1)
    torch.testing.assert_close(value[kept], expected, rtol=1e-10, atol=1e-10)
    assert (value[~kept] == 0).all()


def test_gradient_goes_through_the_prototypes():
    found, labels = draw()
    labels[3] = -100
    assert torch.autograd.gradcheck(lambda x: losses(x, labels), found.requires_grad_())
    # With a class of one row, that of another row's loss reaches it through its prototype alone.
    found, labels = draw(3)[0], torch.tensor([0, 0, 1])
    found.requires_grad_()
    losses(found, labels)[0].backward()
    assert found.grad[2].abs().sum() > 0


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_is_least_at_a_simplex(classes):
    corners = torch.eye(classes, dtype=torch.float64) - 1 / classes
    labels = torch.arange(classes).repeat(3)
    value = losses(corners[labels], labels, temperature=0.5)
    least = math.log1p((classes - 1) * math.exp(-classes / ((classes - 1) * 0.5)))
    torch.testing.assert_close(value, torch.full_like(value, least))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = torch.randn(3 * classes, classes, generator=generator, dtype=torch.float64)
        found = losses(other, labels, temperature=0.5)
        assert found.mean() > least
        assert found.max() < math.log1p((classes - 1) * math.exp(2 / 0.5))


def test_one_class_has_no_loss():
    found, labels = draw()
    assert (losses(found, torch.zeros_like(labels)) == 0).all()


@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_saturated_embeddings(scale):
    found, labels = draw()
    far = (scale * found.float().sign()).requires_grad_()
    value = losses(far, labels)
    value.sum().backward()
    assert value.isfinite().all()
    assert far.grad.isfinite().all()


def test_autocast_computes_in_float32():
    found, labels = draw()
    half = found.bfloat16()
    expected = losses(half.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        value = losses(half, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def test_composes_with_views():
    overrides = ["technique=protoclr", "task=metric_learning", "task.views=2", "tracker=none"]
    run = assemble(compose([*overrides, "task.loss.temperature=0.2", "trainer.batch_size=6"]))
    batch = run.batches.part(0, 0)
    assert len(batch["pixel_values"]) == len(batch["labels"]) == 12
    outputs = run.objective.predict(batch)
    found = run.objective.loss(outputs, batch).double()
    expected = by_hand(F.normalize(outputs["logits"].double(), dim=1), batch["labels"], 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_refuses_a_temperature_that_is_not_positive():
    with pytest.raises(ValueError, match=r"^temperature: "):
        ProtoCLR(0.0)
