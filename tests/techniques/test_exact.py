"""Losses, weightings and penalties in float64, against formulas written with NumPy: 1e-10, and
gradients against finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from models.outputs import Outputs
from techniques.attention.entropy_guided_attention import EntropyGuidedAttention
from techniques.loss.cut_cross_entropy import CutCrossEntropy
from techniques.loss.inf_cl_tiled_contrastive import InfCL
from techniques.loss.poly1_loss import Poly1Loss
from techniques.loss.siglip import SigLIP
from techniques.penalty.entropy_guided_attention import attention_entropy
from techniques.penalty.norm_loss import norm_loss
from techniques.penalty.vat import divergence, mean_entropy
from techniques.weighting.eslm_token_selection import EslmTokenSelection
from techniques.weighting.goldfish_loss import GoldfishLoss

EXACT = {"rtol": 0, "atol": 1e-10}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def units(x):
    x = x.detach().numpy()
    return x / np.sqrt((x * x).sum(1, keepdims=True))


def log_softmax(z):
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


def compare(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), expected, **EXACT)


def test_siglip():
    x, y = normal(5, 3), normal(5, 3, seed=1)
    loss = SigLIP(3.0, -1.0).double()

    def losses(x, y):
        return loss({"image_embeds": x, "text_embeds": y}, {})

    scale = loss.log_temperature.exp().item()  # 3, as float32 has its logarithm
    z = (2 * np.eye(5) - 1) * (scale * units(x) @ units(y).T - 1.0)
    compare(losses(x, y), np.log1p(np.exp(-z)).sum(1))
    assert gradcheck(losses, (x, y))


def test_inf_cl():
    views = normal(8, 3)

    def losses(views):
        return InfCL(0.3)({"logits": views}, {})

    z = units(views) @ units(views).T / 0.3
    expected = []
    for i in range(8):
        others = [z[i, j] for j in range(8) if j != i]
        expected.append(math.log(sum(math.exp(v) for v in others)) - z[i, (i + 4) % 8])
    compare(losses(views), expected)
    assert gradcheck(losses, (views,))


def test_cut_cross_entropy():
    hidden, labels = normal(4, 3), torch.tensor([0, 4, -100, 2])
    classifier = nn.Linear(3, 5).double()

    def losses(hidden, weight, bias):
        head = nn.Linear(3, 5)
        del head.weight, head.bias
        head.weight, head.bias = weight, bias
        return CutCrossEntropy(filter_eps=None)(
            Outputs(hidden=hidden, classifier=head), {"labels": labels}
        )

    weight, bias = classifier.weight, classifier.bias
    logits = hidden.detach().numpy() @ weight.detach().numpy().T + bias.detach().numpy()
    expected = -log_softmax(logits)[np.arange(4), labels.clamp(min=0)]
    expected[2] = 0
    compare(losses(hidden, weight, bias), expected)
    assert gradcheck(losses, (hidden, weight, bias))


@pytest.mark.parametrize("epsilon", [-1.0, 2.0])
def test_poly1(epsilon):
    logits, labels = normal(6, 4), torch.tensor([0, 1, 2, 3, 1, 0])

    def losses(logits):
        return Poly1Loss(epsilon)({"logits": logits}, {"labels": labels})

    log_p = log_softmax(logits.detach().numpy())[np.arange(6), labels]
    compare(losses(logits), -log_p + epsilon * (1 - np.exp(log_p)))
    assert gradcheck(losses, (logits,))


def test_goldfish():
    losses = normal(2, 30)
    labels = torch.randint(1, 50_000, (2, 30), generator=torch.Generator().manual_seed(1))
    weighting = GoldfishLoss(k=3, context=4)
    kept = []
    for row in range(2):
        for i in range(30):
            product = math.prod(labels[row, i - 3 : i + 1].tolist()) if i >= 3 else 0
            wrapped = (product + 2**63) % 2**64 - 2**63
            if i < 3 or weighting.table[wrapped % 1_000_003] >= 1 / 3:
                kept.append(losses[row, i].item())
    assert 10 < len(kept) < 60
    compare(weighting(losses, {}, {"labels": labels}), sum(kept) / len(kept))
    assert gradcheck(lambda x: weighting(x, {}, {"labels": labels}), (losses,))


@pytest.mark.parametrize("risk", ["loss", "entropy"])
def test_eslm(risk):
    losses, logits = normal(4, 5).square().detach().requires_grad_(), normal(4, 5, 7)
    log_p = log_softmax(logits.detach().numpy())
    by = losses.detach().numpy() if risk == "loss" else -(np.exp(log_p) * log_p).sum(-1)
    threshold = np.quantile(by, 0.35, method="inverted_cdf")
    weighting = EslmTokenSelection(0.35, risk)
    found = weighting(losses, {"logits": logits}, {})
    compare(found, losses.detach().numpy()[by >= threshold].mean())
    assert gradcheck(lambda x: weighting(x, {"logits": logits}, {}), (losses,))


class Penalised(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return norm_loss(self.model, {}, {})


def test_norm_loss():
    weight, kernel = normal(3, 4), normal(2, 3, 2, 2, seed=1)
    model = Penalised(nn.Sequential(nn.Linear(4, 3), nn.Conv2d(3, 2, 2)).double())

    def penalty(weight, kernel):
        given = {"model.0.weight": weight, "model.1.weight": kernel}
        return functional_call(model, given, ())

    rows = [*weight.detach().numpy(), *kernel.detach().numpy().reshape(2, -1)]
    compare(penalty(weight, kernel), sum((1 - np.sqrt((r * r).sum())) ** 2 for r in rows))
    assert gradcheck(penalty, (weight, kernel))


def test_vat():
    """The divergence and the entropy that it is made of; the perturbation is a constant."""
    p, q = normal(5, 4), normal(5, 4, seed=1)
    log_p, log_q = (log_softmax(x.detach().numpy()) for x in (p, q))
    compare(divergence(p, q), (np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    compare(mean_entropy(p), -(np.exp(log_p) * log_p).sum(-1).mean())
    assert gradcheck(divergence, (p, q))
    assert gradcheck(mean_entropy, (p,))


def test_entropy_guided_attention():
    torch.manual_seed(0)
    layer = EntropyGuidedAttention(8, 2, 0).double()
    entropy, threshold = normal(3, 2, 5).detach().abs().requires_grad_(), normal(2, seed=1)

    def penalty(entropy, threshold):
        layer.entropy = entropy
        del layer._parameters["threshold"]
        layer.threshold = threshold
        found = attention_entropy(layer, {}, {}, margin=0.1)
        del layer.threshold
        layer.register_parameter("threshold", nn.Parameter(threshold.detach()))
        return found

    largest, total = math.log(5), 0.0
    for sample in range(3):
        for head in range(2):
            for row in range(5):
                gap = entropy[sample, head, row].item() - threshold[head].item() * largest
                total += gap**2 if abs(gap) > 0.1 * largest else 0.0
    compare(penalty(entropy, threshold), total / 2)
    assert gradcheck(penalty, (entropy, threshold))
