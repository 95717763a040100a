import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.linear_cross_entropy import linear_cross_entropy
from study import figures
from study.analyses import ratios
from study.probes.memory import MIB, Flops, Live
from tests.study.test_probes import DIGITS, lines

BATCH, INPUTS, WIDTH, CLASSES, DEPTH = 8, 5, 16, 3, 6
PROBE = "+callbacks.memory={_target_:study.probes.memory.StepMemory}"


def layers(inputs, count):
    sizes = [inputs] + [WIDTH] * count
    pairs = itertools.pairwise(sizes)
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairs))


def flops(forward):
    with Flops() as counted:
        forward().sum().backward()
    return counted.total, counted.recomputed


def test_flops_of_a_perceptron():
    """2·batch·(in·out) of each layer forward, twice that backward but for the input's gradient."""
    hidden, head, x = layers(INPUTS, DEPTH), nn.Linear(WIDTH, CLASSES), torch.randn(BATCH, INPUTS)
    inner = 2 * BATCH * (INPUTS * WIDTH + (DEPTH - 1) * WIDTH**2)
    forward = inner + 2 * BATCH * WIDTH * CLASSES
    plain = 3 * forward - 2 * BATCH * INPUTS * WIDTH
    assert flops(lambda: head(hidden(x))) == (plain, 0)
    for reentrant in (False, True):
        x.requires_grad_(reentrant)  # which that one needs
        expected = plain + inner + reentrant * 2 * BATCH * INPUTS * WIDTH
        found = flops(lambda: head(checkpoint(hidden, x, use_reentrant=reentrant)))  # noqa: B023
        assert found == (expected, inner)


def test_flops_of_attention_and_convolution():
    """Two products of (length, dim) with (dim, length) forward, on either path."""
    q = torch.randn(2, 4, 10, 8, requires_grad=True)
    forward = 2 * 2 * (2 * 4 * 10 * 10 * 8)
    with Flops() as counted:
        nn.functional.scaled_dot_product_attention(q, q, q)
    assert (counted.total, counted.recomputed) == (forward, 0)
    # Fused, the backward makes the scores again: five products; else four.
    fused = flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert (fused, plain) == ((forward * 7 // 2, 0), (forward * 3, 0))
    convolution, images = nn.Conv2d(3, 6, 3, padding=1), torch.randn(2, 3, 8, 8)
    forward = 2 * 2 * 64 * 6 * 3 * 9
    assert flops(lambda: convolution(images)) == (2 * forward, 0)
    segment = nn.Sequential(convolution, nn.ReLU())
    found = flops(lambda: checkpoint(segment, images, use_reentrant=False))
    assert found == (3 * forward, forward)


def test_logits_made_again_by_a_loss_of_its_own_are_recomputed():
    hidden = torch.randn(12, 8, requires_grad=True)
    weight, labels = torch.randn(50, 8, requires_grad=True), torch.randint(0, 50, (12,))
    product = 2 * 12 * 8 * 50

    def loss(backend):
        return linear_cross_entropy(hidden, weight, labels, reduction="none", backend=backend)

    assert flops(lambda: loss("reference")) == (3 * product, 0)
    assert flops(lambda: loss("tiled")) == (4 * product, product)


def test_a_gradient_of_sampled_rows_is_not_recomputed():
    """An estimator's smaller products count as what they are."""

    class Sampled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, *grads):
            x, _ = ctx.saved_tensors
            return None, 2 * grads[0][::2].T @ x[::2]

    x, weight = torch.randn(BATCH, WIDTH), torch.randn(CLASSES, WIDTH, requires_grad=True)
    forward = 2 * BATCH * WIDTH * CLASSES
    assert flops(lambda: Sampled.apply(x, weight)) == (forward * 3 // 2, 0)


def test_products_in_place_count():
    total, a, b = torch.zeros(4, 3), torch.randn(4, 5), torch.randn(5, 3)
    with Flops() as counted:
        total.addmm_(a, b)
        total[None].baddbmm_(a[None], b[None])
    assert counted.total == 2 * (2 * 4 * 5 * 3)


def test_views_of_what_was_there_are_not_made():
    weight = torch.zeros(MIB)
    with Live() as live:
        view = weight.view(2, -1).T.detach()
        weight.add_(1)
    assert live.peak == 0
    del view


def test_step_records_flops(tmp_path):
    """Of 32 digits through two layers of 8 and a head of 10."""
    second = lines(tmp_path, *DIGITS, PROBE)[1]
    forward = 2 * 32 * (64 * 8 + 8 * 8 + 8 * 10)
    assert second["probe/step_flops"] == 3 * forward - 2 * 32 * 64 * 8
    assert second["probe/recomputed_flops"] == 0


def made(arm, seed, depth, memory, losses):
    values = {"probe/step_memory": memory, "probe/step_flops": 3e9, "probe/recomputed_flops": 1e9}
    return {
        "arm": arm,
        "seed": seed,
        "metrics": values,
        "config": {"model": {"depth": depth}},
        "lines": [{"step": i + 1, "train/loss": loss} for i, loss in enumerate(losses)],
    }


TABLE = [
    made(f"{arm}_{depth}", seed, depth, scale * depth**power, [2.0, 1.0 + seed * shift])
    for arm, power, scale, shift in (("plain", 1, 3.0, 0.0), ("mine", 0.5, 2.0, 0.25))
    for depth in (4, 16)
    for seed in (0, 1)
]


def test_ratios_of_arms():
    found = ratios.ratio(TABLE, metric="probe/step_memory", to="plain_16")
    assert found["mine_16"] == pytest.approx({0: 8 / 48, 1: 8 / 48})
    assert "plain_16" not in found
    apart = ratios.apart(TABLE, metric="train/loss", to="plain_4")
    assert apart["mine_16"] == {0: 0.0, 1: 0.25}
    assert apart["plain_16"] == {0: 0.0, 1: 0.0}
    slopes = ratios.exponent(TABLE, metric="probe/step_memory", of="model.depth")
    assert slopes["plain"] == pytest.approx({0: 1.0, 1: 1.0})
    assert slopes["mine"] == pytest.approx({0: 0.5, 1: 0.5})
    for call in (
        lambda: ratios.ratio(TABLE, metric="probe/step_memory", to="other"),
        lambda: ratios.apart(TABLE, metric="val/loss", to="plain_4"),
        lambda: ratios.exponent(TABLE[:2], metric="probe/step_memory", of="model.depth"),
    ):
        with pytest.raises(ValueError, match=r"^(to|of): "):
            call()


def test_figure_of_curves_and_costs():
    drawn = figures.memory(TABLE, arms=["plain_16", "mine_16"])
    curves, memory, work = drawn.axes
    assert [line.get_label() for line in curves.lines] == ["plain_16", "mine_16"]
    assert [round(bar.get_width(), 3) for bar in memory.patches] == [48.0, 8.0]
    assert [bar.get_width() for bar in work.patches] == [3.0, 1.0, 3.0, 1.0]
    assert work.get_xlabel() == "GFLOP of a step"
    with pytest.raises(ValueError, match=r"^arms: no run of 'other'"):
        figures.memory(TABLE, arms=["other"])
