import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.manifold._t_sne import _kl_divergence
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import kneighbors_graph
from torch.autograd import gradcheck

from tasks.pairs import infonce
from techniques.loss.icon_loss import Classes, Clusters, Gaussian, ICon, Near, Neighbours, StudentT
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

LEARNED = {
    "cosine": functools.partial(Gaussian, 0.5, "cosine"),
    "gaussian": functools.partial(Gaussian, 1.0),
    "student": functools.partial(StudentT, 2.0),
    "clusters": Clusters,
}


def draw(rows=8, dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, dtype=torch.float64, generator=generator)


def batch(rows=8):
    return {"pixel_values": draw(rows, 4, 1), "classes": torch.arange(rows) % 3}


def test_partners_and_cosines_are_simclr():
    z = draw(10)
    for sigma in (0.5, 0.3):
        loss = ICon(learned=functools.partial(Gaussian, sigma, "cosine"))
        expected = infonce({"logits": z}, {}, temperature=2 * sigma**2)
        found = loss({"logits": z}, {"pixel_values": z})
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_classes_and_cosines_are_supcon():
    """The L_out of arXiv 2004.11362, equation 2, by loops."""
    z, labels = draw(), batch()["classes"].tolist()
    units = F.normalize(z, dim=1)
    expected = []
    for i in range(8):
        others = [a for a in range(8) if a != i]
        total = sum(math.exp((units[i] @ units[a]).item() / 0.5) for a in others)
        positives = [p for p in others if labels[p] == labels[i]]
        logs = [math.log(math.exp((units[i] @ units[p]).item() / 0.5) / total) for p in positives]
        expected.append(-sum(logs) / len(positives))
    found = ICon(Classes)({"logits": z}, batch())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=z.dtype), rtol=1e-10, atol=0)


def gradient(loss, y, told):
    y = torch.as_tensor(y).requires_grad_()
    loss({"logits": y}, told).sum().backward()
    return y.grad.numpy()


def rows_of(x, sigma):
    """p(j|i) of a Gaussian kernel, by scikit-learn."""
    kernel = rbf_kernel(x, gamma=1 / (2 * sigma**2))
    np.fill_diagonal(kernel, 0)
    return kernel / kernel.sum(1, keepdims=True)


def test_gradients_of_sne_and_tsne():
    """The closed forms: 2·Σⱼ (pᵢⱼ − qᵢⱼ + pⱼᵢ − qⱼᵢ)·(yᵢ − yⱼ) with q of exp(−d²), and the same
    times 1/(1 + d²) with q of that."""
    told, y = batch(), draw(8, 2, 5).numpy()
    p = rows_of(told["pixel_values"].numpy(), 1.5)
    gaps = y[:, None] - y[None]
    squared = (gaps**2).sum(-1)
    kernels = {"sne": np.exp(-squared), "tsne": 1 / (1 + squared)}
    learned = {"sne": functools.partial(Gaussian, math.sqrt(0.5)), "tsne": StudentT}
    for name, kernel in kernels.items():
        factor = kernel.copy() if name == "tsne" else np.ones_like(kernel)
        np.fill_diagonal(kernel, 0)
        difference = p - kernel / kernel.sum(1, keepdims=True)
        weights = 2 * (difference + difference.T) * factor
        expected = (weights[:, :, None] * gaps).sum(1)
        found = gradient(ICon(functools.partial(Near, 1.5), learned[name]), y, told)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_gradient_is_scikit_learns_where_rows_weigh_the_same():
    """t-SNE divides q by the sum over all pairs, not by row: on a regular polygon, where the sums
    of all rows are equal, the gradient is the same."""
    angles = 2 * math.pi * np.arange(8) / 8
    y = 1.3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    told = batch()
    p = rows_of(told["pixel_values"].numpy(), 1.5)
    joint = (p + p.T) / (2 * len(p))
    condensed = joint[np.triu_indices(8, 1)]
    _, expected = _kl_divergence(y.ravel(), condensed, 1, 8, 2)
    found = gradient(ICon(functools.partial(Near, 1.5), StudentT), y, told) / 8
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-10, atol=1e-12)


def test_neighbours_are_scikit_learns():
    x = draw(9, 4, 2)
    p = Neighbours(3)(x, x, torch.eye(9, dtype=torch.bool))
    expected = kneighbors_graph(x.numpy(), 3, include_self=False).toarray() / 3
    np.testing.assert_allclose(p.numpy(), expected, rtol=1e-12)


def test_clusters_by_loops():
    z, told = draw(), batch()
    probabilities = z.softmax(1)
    found = ICon(Classes, Clusters)({"logits": z}, told)
    q = torch.zeros(8, 8, dtype=z.dtype)
    for i in range(8):
        for j in range(8):
            for c in range(3):
                size = sum(probabilities[k, c] for k in range(8))
                q[i, j] += probabilities[i, c] * probabilities[j, c] / size
    torch.testing.assert_close(q.sum(1), torch.ones(8, dtype=z.dtype))
    same = (told["classes"][:, None] == told["classes"]).double().fill_diagonal_(0)
    expected = -(same / same.sum(1, keepdim=True) * q.log()).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", LEARNED)
def test_debiasing_mixes_in_the_mean_over_all_candidates(name):
    """The loss is linear in p: (1 − α) of the plain one, α of that of a uniform p, which is that of
    one class for all, and of clusters the mean over every row."""
    z, told = draw(), batch()
    itself = torch.eye(8, dtype=torch.bool)
    plain = ICon(Classes, LEARNED[name])({"logits": z}, told)
    log_q = LEARNED[name]()(z, z, itself)
    uniform = -log_q.mean(1) if name == "clusters" else -log_q[~itself].view(8, 7).mean(1)
    found = ICon(Classes, LEARNED[name], alpha=0.4)({"logits": z}, told)
    torch.testing.assert_close(found, 0.6 * plain + 0.4 * uniform, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", LEARNED)
def test_gradient_and_saturation(name):
    z = draw(6).requires_grad_()
    loss = ICon(functools.partial(Near, 1.0), LEARNED[name], alpha=0.2)
    assert gradcheck(lambda z: loss({"logits": z}, batch(6)), z)

    far = (1e4 * draw(6).float().sign()).requires_grad_()
    losses = loss({"logits": far}, batch(6))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert far.grad.isfinite().all()


def test_rows_without_neighbours_have_no_loss():
    told = {"labels": torch.tensor([0, 0, 1, -100, -100])}
    losses = ICon(Classes, alpha=0.5)({"logits": draw(5)}, told)
    assert (losses[:2] > 0).all()
    assert losses[2:].tolist() == [0, 0, 0]


def test_overlay_is_simclr_and_takes_other_neighbours():
    run = assemble(compose(["task=pairs", "technique=icon", "task.loss.alpha=0.1"]))
    loss = run.objective.loss
    assert (loss.alpha, loss.learned.sigma, loss.learned.metric) == (0.1, 0.5, "cosine")
    again = compose(
        [
            *("task=pairs", "technique=icon_loss"),
            "task.loss.supervision._target_=techniques.loss.icon_loss.Neighbours",
            "+task.loss.supervision.k=5",
        ]
    )
    assert assemble(again).objective.loss.supervision.k == 5


def test_refuses():
    with pytest.raises(ValueError, match="alpha"):
        ICon(alpha=1.0)
    for make, name in (
        (lambda: Gaussian(0.0), "sigma"),
        (lambda: Gaussian(1.0, "dot"), "metric"),
        (lambda: StudentT(-1.0), "gamma"),
        (lambda: Neighbours(0), "k"),
    ):
        with pytest.raises(ValueError, match=name):
            make()
    with pytest.raises(UsageError, match="captions"):
        ICon()({"image_embeds": draw(), "text_embeds": draw()}, {})
    with pytest.raises(UsageError, match="two views"):
        ICon()({"logits": draw(3)}, {"pixel_values": draw(3)})
    with pytest.raises(UsageError, match="labels"):
        ICon(Classes)({"logits": draw()}, {})
    with pytest.raises(UsageError, match="features"):
        ICon(functools.partial(Near, 1.0, "features"))({"logits": draw()}, batch())
