import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr, softmax
from torch import nn

from techniques.penalty.saf import SAF
from training.assemble import assemble
from training.compose import compose

MODEL = nn.Identity()


def batch_of(rows=6, classes=5, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    logits, past = (
        scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    batch = {"index": torch.arange(rows), "epoch": torch.arange(3, 3 + rows)}
    known = torch.ones(rows, dtype=torch.bool)
    return logits, batch | {"logits_2_ago": past, "known_2_ago": known, "part": 0}


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_is_the_divergence_from_past_to_present(temperature):
    """By SciPy; of the epochs 3 to 8 those after 5 count, the mean is over all."""
    logits, batch = batch_of()
    value = SAF(temperature=temperature)(MODEL, {"logits": logits}, batch)
    p, q = (softmax(x.numpy() / temperature, 1) for x in (batch["logits_2_ago"], logits))
    expected = temperature**2 * rel_entr(p, q)[3:].sum() / 6
    assert value.item() == pytest.approx(expected, abs=1e-10)


def test_equals_the_expression_of_the_code():
    logits, batch = batch_of()
    batch["epoch"] += 10
    now, past = logits.softmax(-1), batch["logits_2_ago"].softmax(-1)
    expected = F.kl_div(now.log(), past, reduction="none").sum(-1).mean()
    value = SAF(temperature=1.0)(MODEL, {"logits": logits}, batch)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)


def test_gradcheck():
    logits, batch = batch_of()
    penalty = SAF()
    assert torch.autograd.gradcheck(
        lambda z: penalty(MODEL, {"logits": z}, batch), logits.requires_grad_(), atol=1e-8
    )


def test_is_zero_where_nothing_has_changed_and_before_it_begins():
    logits, batch = batch_of()
    shifted = (batch["logits_2_ago"] + 3.0).requires_grad_()  # the same predictions
    early = batch | {"epoch": torch.full((6,), 5)}
    unknown = batch | {"known_2_ago": torch.zeros(6, dtype=torch.bool)}
    for z, given in (
        (shifted, batch),
        (logits.requires_grad_(), early),
        (logits, unknown),
        (logits, unknown | {"logits_2_ago": torch.zeros(6, 0)}),
    ):
        value = SAF()(MODEL, {"logits": z}, given)
        (gradient,) = torch.autograd.grad(value, z)
        assert value.item() == pytest.approx(0.0, abs=1e-12)
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_logits(dtype):
    """Finite, and the gradient is τ·(q − p)/rows for one-hot p and q."""
    logits, batch = batch_of(scale=1e4)
    batch |= {"epoch": torch.full((6,), 9), "logits_2_ago": batch["logits_2_ago"].float()}
    z = logits.to(dtype).requires_grad_()
    value = SAF()(MODEL, {"logits": z}, batch)
    assert value.dtype == torch.float32
    assert value.isfinite()
    value.backward()
    p, q = (F.one_hot(x.argmax(1), 5).float() for x in (batch["logits_2_ago"], logits))
    torch.testing.assert_close(z.grad.float(), 5 * (q - p) / 6, atol=1e-2, rtol=1e-2)


def test_overlay_and_refusals():
    overrides = ["task=digits", "technique=saf", "penalties.saf.epochs=3"]
    run = assemble(compose(overrides))
    penalty, coefficient = run.objective.penalties["saf"]
    assert coefficient == 0.3
    assert (penalty.epochs, penalty.temperature, penalty.start) == (3, 5.0, 5)
    assert run.callbacks["saf"].epochs == 3
    for name, value in (("epochs", 0), ("temperature", 0.0), ("start", -1)):
        with pytest.raises(ValueError, match=f"{name}: must"):
            SAF(**{name: value})
    logits, batch = batch_of()
    with pytest.raises(ValueError, match="no logits_3_ago"):
        SAF(epochs=3)(MODEL, {"logits": logits}, batch)
    assert np.isfinite(SAF()(MODEL, {"logits": logits}, batch).item())
