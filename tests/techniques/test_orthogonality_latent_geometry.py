import pytest
import torch
from scipy.spatial.distance import cosine
from torch import nn
from torch.autograd import gradcheck

from techniques.loss.orthogonality_latent_geometry import alignment
from techniques.penalty.orthogonality_latent_geometry import LatentOrthogonality
from techniques.reparam.orthogonality_latent_geometry import freeze_text
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

MODEL = nn.Module()
TASK = ("task=pairs", "task.text_column=caption", "model.width=16", "model.depth=1")


def draw(rows=7, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, dtype=torch.float64, generator=generator)


def by_loops(z, off_diagonal):
    """The authors' formula in pure Python."""
    rows, total = z.tolist(), 0.0
    for i in range(len(rows[0])):
        for j in range(len(rows[0])):
            g = sum(row[i] * row[j] for row in rows) / len(rows)
            total += (g - 1) ** 2 if i == j else off_diagonal * g**2
    return total / 2


@pytest.mark.parametrize("off_diagonal", [0.0051, 0.0, 1.0])
@pytest.mark.parametrize("name", ["image_hidden", "hidden"])
def test_penalty_is_the_authors(off_diagonal, name):
    z = draw()
    found = LatentOrthogonality(off_diagonal)(MODEL, {name: z}, {}).item()
    assert found == pytest.approx(by_loops(z, off_diagonal), rel=1e-12)


def test_penalty_of_orthogonal_features_is_zero():
    """Columns of a Hadamard matrix; at a constant of one only the products are left."""
    signs = torch.tensor([[1.0, 1, 1], [1, -1, 1], [1, 1, -1], [1, -1, -1]])
    assert LatentOrthogonality()(MODEL, {"hidden": signs}, {}).item() == 0
    ones = torch.ones(4, 3, dtype=torch.float64)
    found = LatentOrthogonality()(MODEL, {"hidden": ones}, {}).item()
    assert found == pytest.approx(0.0051 * 6 / 2)


def test_alignment_is_scipys_cosine_distance():
    images, texts = draw(), draw(seed=1)
    losses = alignment({"image_embeds": images, "text_embeds": texts}, {})
    expected = [4 * cosine(x, y) for x, y in zip(images.numpy(), texts.numpy())]
    torch.testing.assert_close(
        losses, torch.tensor(expected, dtype=losses.dtype), rtol=1e-10, atol=0
    )


def test_gradients():
    penalty = LatentOrthogonality()
    assert gradcheck(lambda z: penalty(MODEL, {"hidden": z}, {}), draw().requires_grad_())
    both = draw().requires_grad_(), draw(seed=1).requires_grad_()
    assert gradcheck(lambda x, y: alignment({"image_embeds": x, "text_embeds": y}, {}), both)


def test_saturated_features_and_embeddings():
    x, y = ((1e4 * draw(seed=n).float().sign()).requires_grad_() for n in (0, 1))
    penalty = LatentOrthogonality()(MODEL, {"hidden": x}, {})
    losses = alignment({"image_embeds": x, "text_embeds": y}, {})
    (penalty + losses.sum()).backward()
    assert penalty.isfinite()
    assert losses.isfinite().all()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


def test_half_precision_is_computed_in_float32():
    z = draw().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = LatentOrthogonality()(MODEL, {"hidden": z}, {})
    assert found.item() == pytest.approx(by_loops(z.double(), 0.0051), rel=1e-5)


def test_overlay_freezes_the_text_and_reads_the_images_features():
    overlay = "technique=orthogonality_latent_geometry"
    options = "penalties.orthogonality_latent_geometry.off_diagonal=0.1"
    run = assemble(compose([*TASK, overlay, options]))
    frozen = {name for name, p in run.model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in run.model.named_parameters() if name.startswith("text.")}
    penalty, coefficient = run.objective.penalties["orthogonality_latent_geometry"]
    assert (penalty.off_diagonal, coefficient) == (0.1, 1.0)

    batch = run.batches[0][0]
    seen = []
    run.model.image.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    value = run.objective(batch).parts["orthogonality_latent_geometry"].item()
    assert value == pytest.approx(by_loops(seen[0].double(), 0.1), rel=1e-4)


def test_refuses():
    with pytest.raises(ValueError, match="off_diagonal"):
        LatentOrthogonality(-0.1)
    with pytest.raises(UsageError, match="features"):
        LatentOrthogonality()(MODEL, {"hidden": torch.zeros(2, 3, 4)}, {})
    with pytest.raises(UsageError, match="captions"):
        alignment({"logits": draw(8)}, {})
    with pytest.raises(UsageError, match="text transformer"):
        freeze_text(nn.Linear(2, 2))
