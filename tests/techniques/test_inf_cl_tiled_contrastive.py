import pytest
import torch

from kernels.contrastive_loss import tiled
from tasks.pairs import infonce
from techniques.loss.inf_cl_tiled_contrastive import InfCL
from training.compose import compose


def outputs(kind, count=12, dim=6):
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(count, dim, generator=generator) for _ in range(2))
    if kind == "views":
        return {"logits": torch.cat([one, other]).requires_grad_()}
    return {"image_embeds": one.requires_grad_(), "text_embeds": other.requires_grad_()}


@pytest.mark.parametrize("kind", ["views", "captions"])
def test_equals_the_dense_infonce(kind, monkeypatch):
    monkeypatch.setattr(tiled, "ELEMENTS", 60)  # five rows of views at a time
    values, gradients = [], []
    for loss in (InfCL(0.3), lambda o, b: infonce(o, b, temperature=0.3)):
        found = outputs(kind)
        losses = loss(found, {})
        (losses * torch.arange(len(losses))).sum().backward()
        values.append(losses)
        gradients.append([x.grad for x in found.values()])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


def test_saves_no_matrix_of_similarities():
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        InfCL()(outputs("views", 40), {})
        assert max(kept) == 80 * 6
        infonce(outputs("views", 40), {})
        assert max(kept) == 80 * 80


def test_overlay_takes_the_tasks_temperature():
    task = compose(["task=pairs", "technique=inf_cl", "task.temperature=0.2"])["task"]
    assert task["loss"]["temperature"] == task["eval_loss"]["temperature"] == 0.2


def test_refuses_a_temperature_that_is_not_positive():
    with pytest.raises(ValueError, match="temperature"):
        InfCL(-1.0)
