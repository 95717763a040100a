import numpy as np
import pytest
import torch
from torch import nn

from techniques.gradient.mixed_precision_loss_scaling import MixedPrecision
from techniques.reparam.mixed_precision_loss_scaling import half_activations
from tests.techniques.gradients import CURVATURE, Bowl, gradient, microbatches, objective
from training.assemble import assemble
from training.compose import compose

START = Bowl().w.detach()


def test_gradient_at_rounded_weights_is_rounded_scaled():
    """By NumPy's float16, in whose range 1e-4·c·w is only with the scale."""
    for scale in (1.0, 1024.0, None):
        model, technique = Bowl(), MixedPrecision(scale)
        with torch.no_grad():
            model.w.copy_(START * 1e-7)
        technique(objective(model), model, microbatches(1), torch.Tensor.backward)
        weights = (START.numpy() * 1e-7).astype(np.float16).astype(np.float64)
        factor = scale or 65536.0
        rounded = (CURVATURE.numpy() * weights * factor).astype(np.float16).astype(np.float64)
        np.testing.assert_allclose(model.w.grad.numpy(), rounded / factor, rtol=1e-10)
        assert model.w.detach().equal(START * 1e-7)


def test_within_range_it_is_backpropagation():
    """Of numbers that float16 has: halves of small integers."""
    torch.testing.assert_close(gradient(MixedPrecision(1024.0))[0], CURVATURE * START)


def test_small_updates_are_lost_without_the_master_copy():
    """2⁻¹² is a quarter of the last place of 1 in float16: only the master copy adds them up."""
    for master, expected in ((True, 1 + 16 * 2.0**-12), (False, 1.0)):
        model, technique = Bowl(), MixedPrecision(master=master)
        with torch.no_grad():
            model.w.fill_(1.0)
        for _ in range(16):
            technique(objective(model), model, microbatches(), torch.Tensor.backward)
            with torch.no_grad():
                model.w += 2.0**-12
            model.w.grad = None
        technique(objective(model), model, microbatches(), torch.Tensor.backward)
        assert model.w.detach().tolist() == pytest.approx([expected] * 3, abs=0)


def test_small_gradients_vanish_without_the_scale():
    for scale, gone in ((1.0, True), (1024.0, False)):
        model = Bowl()
        with torch.no_grad():
            model.w.fill_(2.0**-9)
        backward = lambda loss: (loss * 2.0**-20).backward()  # noqa: E731
        MixedPrecision(scale)(objective(model), model, microbatches(1), backward)
        assert bool((model.w.grad == 0).all()) is gone


def test_dynamic_scale_is_that_of_torch():
    """`torch.amp.GradScaler` on the same gradients, finite or not."""
    keys = {"init_scale": 64.0, "growth_interval": 3}
    technique = MixedPrecision(**keys)
    scaler, dummy = torch.amp.GradScaler("cpu", **keys), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([dummy], lr=0.0)
    scaler.scale(torch.ones(()))
    for finite in (True, False, True, True, True, True, False, False, True, True, True):
        model = Bowl()
        factor = 1.0 if finite else 1e9
        technique(
            objective(model), model, microbatches(1), lambda loss, f=factor: (loss * f).backward()
        )
        assert (model.w.grad is not None) is finite
        dummy.grad = torch.tensor([1.0 if finite else torch.inf])
        scaler.step(optimizer)
        scaler.update()
        assert technique.scale == scaler.get_scale()
    again = MixedPrecision(**keys)
    again.load_state_dict(technique.state_dict())
    assert (again.scale, again.streak) == (technique.scale, technique.streak)


def test_defaults_are_torchs():
    ours, theirs = MixedPrecision(), torch.amp.GradScaler("cpu")
    assert ours.scale == theirs.get_scale()
    assert ours.growth_factor == theirs.get_growth_factor()
    assert ours.backoff_factor == theirs.get_backoff_factor()
    assert ours.growth_interval == theirs.get_growth_interval()


def test_a_fixed_scale_stays():
    technique, model = MixedPrecision(scale=1e6), Bowl()
    with torch.no_grad():
        model.w.fill_(100.0)
    technique(objective(model), model, microbatches(), torch.Tensor.backward)
    assert model.w.grad is None
    assert technique.scale == 1e6


def test_activations_and_their_gradients_are_rounded_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    half_activations(model)
    x = torch.randn(5, 6, requires_grad=True)
    grad = torch.randn(5, 4) * 1e-5

    def rounded(values):
        return values.astype(np.float16).astype(np.float32)

    first = model[0].weight.detach().numpy(), model[0].bias.detach().numpy()
    before = rounded(x.detach().numpy() @ first[0].T + first[1])
    out = model(x)
    np.testing.assert_allclose(out.detach().numpy(), rounded(np.tanh(before)), rtol=1e-3)
    out.backward(grad)
    back = rounded(rounded(grad.numpy()) * (1 - np.tanh(before) ** 2))
    np.testing.assert_allclose(x.grad.numpy(), back @ first[0], rtol=2e-2, atol=2e-7)
    assert (out.half().float() == out).all()


def test_overflow_and_underflow_of_activations():
    layer = nn.Identity()
    half_activations(layer)
    x = torch.tensor([65519.0, 65520.0, 2.0**-25, 2.0**-25 * 1.01])
    assert layer(x).tolist() == [65504.0, torch.inf, 0.0, 2.0**-24]
    layer.exact = True
    assert layer(x).equal(x)


def test_composes():
    settings = ("gradient.scale=8", "gradient.master=false", "gradient.growth_interval=7")
    given = ("task=digits", "technique=mixed_precision_loss_scaling", *settings)
    run = assemble(compose([*given, "tracker=none", "trainer.device=cpu"]))
    assert (run.gradient.scale, run.gradient.master, run.gradient.dynamic) == (8, False, False)
    assert run.gradient.growth_interval == 7
    assert all(module.exact is False for module in run.model.modules())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scale": 0.0}, "scale"),
        ({"init_scale": -1.0}, "init_scale"),
        ({"growth_factor": 1.0}, "growth_factor"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval"),
    ],
)
def test_refusals(keys, message):
    with pytest.raises(ValueError, match=f"^{message}: "):
        MixedPrecision(**keys)


def test_refuses_a_trainer_that_scales():
    class Scaled:
        scale = 2.0

    model = Bowl()
    with pytest.raises(ValueError, match="fp16 scales the loss itself"):
        MixedPrecision()(objective(model), model, microbatches(), Scaled())
