import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.outputs import Outputs
from tasks.losses import cross_entropy
from techniques.loss.cut_cross_entropy import CutCrossEntropy

DIM, VOCAB = 16, 300


def outputs_and_batch(bias: bool = False, scale: float = 1.0) -> tuple[Outputs, dict]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    classifier = nn.Linear(DIM, VOCAB, bias=bias)
    hidden = scale * torch.randn(3, 11, DIM, generator=generator)
    labels = torch.randint(VOCAB, (3, 11), generator=generator)
    labels[0, :4] = -100
    return Outputs(hidden=hidden.requires_grad_(), classifier=classifier), {"labels": labels}


def in_float64(outputs: Outputs, batch: dict, softcap: float | None = None, smoothing: float = 0.0):
    """Losses and gradients from the whole logits matrix."""
    hidden = outputs["hidden"].detach().double().requires_grad_()
    weight = outputs["classifier"].weight.detach().double().requires_grad_()
    logits = hidden @ weight.T
    if outputs["classifier"].bias is not None:
        logits = logits + outputs["classifier"].bias.detach().double()
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    losses = F.cross_entropy(
        logits.transpose(1, 2), batch["labels"], reduction="none", label_smoothing=smoothing
    )
    losses.square().sum().backward()  # an upstream gradient that differs by token
    return losses, hidden.grad, weight.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "smoothing"), [(None, 0.0), (5.0, 0.0), (None, 0.1)])
def test_is_cross_entropy_of_the_logits(bias, softcap, smoothing):
    outputs, batch = outputs_and_batch(bias, scale=3.0)
    losses = CutCrossEntropy(softcap=softcap, label_smoothing=smoothing)(outputs, batch)
    losses.square().sum().backward()
    expected, hidden_grad, weight_grad = in_float64(outputs, batch, softcap, smoothing)
    assert losses.shape == batch["labels"].shape
    assert (losses[0, :4] == 0).all()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    grads = outputs["hidden"].grad, outputs["classifier"].weight.grad
    torch.testing.assert_close(grads[0].double(), hidden_grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[1].double(), weight_grad, rtol=1e-4, atol=1e-4)


def test_makes_and_keeps_no_logits():
    outputs, batch = outputs_and_batch()
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        CutCrossEntropy()(outputs, batch)
    assert "logits" not in outputs
    assert max(kept) < outputs["hidden"].shape[:-1].numel() * VOCAB
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy(outputs, batch)
    assert max(kept) == outputs["hidden"].shape[:-1].numel() * VOCAB  # as the plain loss does


def test_autocast_multiplies_in_bfloat16_and_returns_float32():
    outputs, batch = outputs_and_batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = CutCrossEntropy()(outputs, batch)
    losses.square().sum().backward()
    expected, _, weight_grad = in_float64(outputs, batch)
    assert losses.dtype == torch.float32
    assert outputs["classifier"].weight.grad.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=0.02, atol=0.02)
    error = outputs["classifier"].weight.grad - weight_grad
    assert error.norm() < 0.02 * weight_grad.norm()


def test_works_with_a_reparametrised_classifier():
    outputs, batch = outputs_and_batch()
    nn.utils.parametrizations.weight_norm(outputs["classifier"])
    losses = CutCrossEntropy()(outputs, batch)
    torch.testing.assert_close(losses, cross_entropy(outputs, batch), rtol=1e-5, atol=1e-5)


def test_refuses_a_model_without_hidden_states():
    with pytest.raises(ValueError, match="needs a model that returns") as raised:
        CutCrossEntropy()({"logits": torch.zeros(1, 2)}, {"labels": torch.zeros(1)})
    assert "\n" not in str(raised.value)


def test_refuses_a_head_that_is_not_linear():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for head in (nn.Sequential(nn.Linear(DIM, VOCAB)), Doubled(DIM, VOCAB)):
        outputs, batch = outputs_and_batch()
        outputs["classifier"] = head
        with pytest.raises(ValueError, match="needs a linear head"):
            CutCrossEntropy()(outputs, batch)


@pytest.mark.parametrize(
    ("name", "value"),
    [("softcap", 0.0), ("label_smoothing", 1.5), ("filter_eps", "high"), ("backend", "cuda")],
)
def test_refuses_options_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        CutCrossEntropy(**{name: value})
