import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from techniques.loss.icon_loss import ICon
from techniques.loss.vicreg import VICReg
from techniques.penalty.orthogonality_latent_geometry import LatentOrthogonality
from tests.processes import in_processes
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError


def views(pairs=7, dim=5, scale=0.8):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(2 * pairs, dim, dtype=torch.float64, generator=generator)


def by_numpy(z, invariance=25.0, variance=25.0, covariance=1.0):
    """The authors' scalar, from `np.cov` and `np.var`."""
    x, y = np.split(z.numpy(), 2)
    total = invariance * np.mean((x - y) ** 2)
    for one in (x, y):
        std = np.sqrt(np.var(one, axis=0, ddof=1) + 1e-4)
        total += variance * np.mean([max(0.0, 1 - s) for s in std]) / 2
        c = np.cov(one, rowvar=False)
        off = sum(c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j)
        total += covariance * off / len(c)
    return total


@pytest.mark.parametrize("scale", [0.1, 0.8, 3.0])
@pytest.mark.parametrize("coefficients", [(25.0, 25.0, 1.0), (25.0, 0.0, 1.0), (1.0, 2.0, 3.0)])
def test_is_the_authors_scalar(scale, coefficients):
    z = views(scale=scale)
    found = VICReg(*coefficients)({"logits": z}, {}).mean().item()
    assert found == pytest.approx(by_numpy(z, *coefficients), rel=1e-12)


def test_a_pairs_loss_is_its_own_distance_and_what_all_share():
    z = views()
    losses = VICReg()({"logits": z}, {})
    own = 25 * (z[:7] - z[7:]).square().mean(1)
    assert losses.shape == (7,)
    torch.testing.assert_close(losses - own, (losses - own)[:1].expand(7), rtol=1e-12, atol=1e-12)


def test_values_known_by_hand():
    """Collapsed: the hinge alone, 25·(1 − √1e-4). Wide, equal and uncorrelated: nothing."""
    losses = VICReg()({"logits": torch.ones(6, 3, dtype=torch.float64)}, {})
    torch.testing.assert_close(losses, torch.full((3,), 24.75, dtype=torch.float64))
    corners = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
    assert VICReg()({"logits": corners.repeat(2, 1)}, {}).tolist() == [0.0] * 4


def test_gradient():
    z = views(4, 3).requires_grad_()
    assert gradcheck(lambda z: VICReg()({"logits": z}, {}), z)


def test_saturated_embeddings():
    z = (1e4 * views().float().sign()).requires_grad_()
    losses = VICReg()({"logits": z}, {})
    losses.sum().backward()
    assert losses.isfinite().all()
    assert z.grad.isfinite().all()


def test_half_precision_is_computed_in_float32():
    z = views().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses = VICReg()({"logits": z}, {})
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, VICReg()({"logits": z.float()}, {}), rtol=1e-6, atol=0)


def _process(rank):
    """Losses and gradients of this process's half are those of one process with all."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 8, 5, dtype=torch.float64, generator=generator)  # view, pair, feature
    orthogonality = LatentOrthogonality()
    model = torch.nn.Module()  # in training mode
    parts = {
        "vicreg": lambda z, b: VICReg()({"logits": z}, b).mean(),
        "icon": lambda z, b: ICon(alpha=0.3)({"logits": z}, b).mean(),
        "penalty": lambda z, b: orthogonality(model, {"hidden": z}, b),
    }
    for name, loss in parts.items():
        own = whole[:, 4 * rank : 4 * rank + 4].flatten(0, 1).requires_grad_()
        value = loss(own, {"pixel_values": own.detach()})
        value.backward()
        halves = [torch.empty_like(value.detach()) for _ in range(2)]
        torch.distributed.all_gather(halves, value.detach())

        alone = whole.flatten(0, 1).requires_grad_()
        one = _alone(loss, alone)
        torch.testing.assert_close(torch.stack(halves).mean(), one, msg=name)
        expected = torch.autograd.grad(one, alone)[0].view(2, 8, 5)[:, 4 * rank : 4 * rank + 4]
        torch.testing.assert_close(own.grad / 2, expected.flatten(0, 1), msg=name)


def _alone(loss, z):
    """The loss as if there were one process."""
    original = torch.distributed.get_world_size
    torch.distributed.get_world_size = lambda group=None: 1
    try:
        return loss(z, {"pixel_values": z.detach()})
    finally:
        torch.distributed.get_world_size = original


@pytest.mark.slow
def test_two_processes_are_one_with_both_batches():
    in_processes(_process, 2)


def test_overlay_has_the_papers_coefficients(tmp_path):
    run = assemble(compose(["task=pairs", "technique=vicreg", f"outputs={tmp_path}"]))
    loss = run.objective.loss
    assert isinstance(loss, VICReg)
    assert (loss.invariance, loss.variance, loss.covariance) == (25, 25, 1)


def test_refuses():
    with pytest.raises(ValueError, match="covariance"):
        VICReg(covariance=-1.0)
    with pytest.raises(UsageError, match="captions"):
        VICReg()({"image_embeds": views(), "text_embeds": views()}, {})
    with pytest.raises(UsageError, match="2 pairs"):
        VICReg()({"logits": views(1)}, {})
