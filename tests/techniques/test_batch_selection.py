import numpy as np
import pytest
import torch
from scipy.stats import percentileofscore

from techniques.weighting.batch_selection import RhoLoss, SelectiveBackprop
from training.errors import UsageError

LABELS = torch.tensor([[0, 1, 2], [1, -100, 0], [2, 2, -100], [0, 0, 1]])
LOSSES = torch.tensor([[1.0, 2.0, 3.0], [5.0, 0.0, 1.0], [0.5, 0.1, 0.0], [4.0, 4.0, 4.0]])
MEANS = np.array([2.0, 3.0, 0.3, 4.0])


def test_ranks_are_scipys():
    torch.manual_seed(0)
    select = SelectiveBackprop(history=50)
    seen = []
    for _ in range(4):
        losses = torch.randint(9, (20, 1)).double()  # with many equals
        seen += losses.flatten().tolist()
        select(losses, {}, {"labels": torch.zeros(20, 1, dtype=torch.long)})
        expected = percentileofscore(seen[-50:], losses.flatten().numpy()) / 100
        np.testing.assert_allclose(select.ranks(losses.flatten()), expected, rtol=1e-6)


def test_samples_are_accepted_as_often_as_their_ranks_say():
    """The mean over draws of one sample's share of the gradient, within four deviations."""
    torch.manual_seed(0)
    draws, counts = 2000, np.zeros(4)
    for _ in range(draws):
        losses = LOSSES.clone().requires_grad_()
        found = SelectiveBackprop(beta=2.0)(losses, {}, {"labels": LABELS})
        (gradient,) = torch.autograd.grad(found, losses)
        counts += gradient.abs().sum(1).numpy() > 0
    p = (np.array([2, 3, 1, 4]) / 4) ** 2
    assert (np.abs(counts / draws - p) <= 4 * np.sqrt(p * (1 - p) / draws) + 1e-12).all()


def test_without_selectivity_it_is_the_plain_mean():
    found = SelectiveBackprop(beta=0.0)(LOSSES, {}, {"labels": LABELS})
    assert found.item() == pytest.approx(LOSSES.sum().item() / 10)


def test_the_history_is_kept():
    first = SelectiveBackprop(history=6)
    first(LOSSES, {}, {"labels": LABELS})
    again = SelectiveBackprop(history=6)
    again.load_state_dict(first.state_dict())
    np.testing.assert_allclose(again.history[-4:], MEANS, rtol=1e-6)


def test_rho_takes_those_with_most_left_to_learn():
    """Excess over the teacher: the second and third samples, whatever their losses."""
    teacher = torch.full((4, 3, 3), 0.0)
    for row, sharp in enumerate((-5.0, 8.0, 8.0, -5.0)):  # surely wrong, or surely right
        teacher[row].scatter_(1, LABELS[row].clamp(min=0)[:, None], sharp)
    log_p = teacher.double().numpy() - np.log(np.exp(teacher.double().numpy()).sum(-1))[..., None]
    irreducible = [
        -np.mean([log_p[r, c, label] for c, label in enumerate(row) if label >= 0])
        for r, row in enumerate(LABELS.tolist())
    ]
    chosen = np.argsort(irreducible - MEANS)[:2]
    assert set(chosen.tolist()) == {1, 2}
    batch = {"labels": LABELS, "teacher_logits": teacher}
    assert RhoLoss(keep=0.5)(LOSSES, {}, batch).item() == pytest.approx((5 + 1 + 0.5 + 0.1) / 4)
    assert RhoLoss(keep=1.0)(LOSSES, {}, batch).item() == pytest.approx(LOSSES.sum().item() / 10)


def test_refusals():
    with pytest.raises(ValueError, match="beta"):
        SelectiveBackprop(beta=-1.0)
    with pytest.raises(ValueError, match="history"):
        SelectiveBackprop(history=0)
    with pytest.raises(ValueError, match="keep"):
        RhoLoss(keep=0.0)
    with pytest.raises(UsageError, match="teacher"):
        RhoLoss()(LOSSES, {}, {"labels": LABELS})
