import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.special import softmax

from tasks.losses import masked_mean
from techniques.weighting import loss_based_reweighting
from techniques.weighting.loss_based_reweighting import LossBasedReweighting
from training.assemble import assemble
from training.compose import compose

STRATEGIES = {
    "linupper": lambda h: np.minimum(h + 1, 1),
    "quadratic": lambda h: 1 - h**2,
    "extremes": np.abs,
}


def sample_losses(count=9, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, length, generator=generator, dtype=torch.float64).square()


def expected_weights(losses, strategy, temperature):
    """Of NumPy losses (samples,): the paper's formula with SciPy's softmax."""
    low, high = losses.min(), losses.max()
    h = 2 * losses / (high - low) - (high + low) / (high - low)
    return softmax(STRATEGIES[strategy](h) / temperature)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("temperature", [0.05, 0.4, 1.0, 100.0])
def test_is_the_weighted_sum_of_the_samples_losses(strategy, temperature):
    losses = sample_losses()
    weights = expected_weights(losses.mean(1).numpy(), strategy, temperature)
    found = LossBasedReweighting(strategy, temperature, 0)(losses, {}, {})
    expected = (weights * losses.mean(1).numpy()).sum()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_strategies_are_the_papers():
    """Losses 0 to 4: h is −1, −½, 0, ½, 1."""
    losses, counted = torch.arange(5, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    for strategy, scores in {
        "linupper": [0, 0.5, 1, 1, 1],
        "quadratic": [0, 0.75, 1, 0.75, 0],
        "extremes": [1, 0.5, 0, 0.5, 1],
    }.items():
        weights = LossBasedReweighting(strategy, 0.4).weights(losses, counted)
        torch.testing.assert_close(
            weights / 5, torch.tensor(scores, dtype=torch.float64).div(0.4).softmax(0)
        )


def test_ignored_labels_and_samples_take_no_part():
    losses = sample_losses()
    labels = torch.zeros(losses.shape, dtype=torch.int64)
    labels[:, 3:] = -100
    labels[4] = -100
    masked = losses.masked_fill(labels == -100, 0.0)
    weighting = LossBasedReweighting("linupper", 0.4, 0)
    others = [i for i in range(9) if i != 4]
    found = weighting(masked, {}, {"labels": labels})
    torch.testing.assert_close(found, weighting(losses[others, :3], {}, {}))
    labels[:] = -100
    assert weighting(torch.zeros_like(losses), {}, {"labels": labels}) == 0


def test_longer_samples_weigh_more():
    """As in `src/trainer.py`: n·Σ w_i·(c_i/Σc)·ℓ_i."""
    losses, labels = sample_losses(3, 4), torch.zeros(3, 4, dtype=torch.int64)
    labels[0, 1:], labels[1, 3:] = -100, -100
    counts = np.array([1, 3, 4])
    means = np.array([losses[i, :c].mean() for i, c in enumerate(counts)])
    weights = expected_weights(means, "quadratic", 1.0)
    found = LossBasedReweighting("quadratic", 1.0, 0)(
        losses.masked_fill(labels == -100, 0.0), {}, {"labels": labels}
    )
    expected = 3 * (weights * counts / counts.sum() * means).sum()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_limits_are_the_plain_mean():
    losses = sample_losses()
    plain = masked_mean(losses, {}, {})
    torch.testing.assert_close(LossBasedReweighting("linupper", 1e12, 0)(losses, {}, {}), plain)
    equal = torch.full((4, 3), 2.5)
    assert LossBasedReweighting("linupper", 0.1, 0)(equal, {}, {}) == 2.5
    warming = LossBasedReweighting("linupper", 0.1, 3)
    torch.testing.assert_close(warming(losses, {}, {"step": torch.tensor(2)}), plain)
    assert warming(losses, {}, {"step": torch.tensor(3)}) > plain


def test_no_gradient_flows_through_the_weights():
    losses = sample_losses().requires_grad_()
    LossBasedReweighting("linupper", 0.4, 0)(losses, {}, {}).backward()
    weights = expected_weights(losses.detach().mean(1).numpy(), "linupper", 0.4)
    np.testing.assert_allclose(losses.grad[:, 0], weights / 5, rtol=1e-12)


def test_processes_share_one_softmax(monkeypatch):
    """Two threads with uneven parts meet in the reductions; the trainer's shares make one loss."""
    losses, meeting, told = sample_losses(), threading.Barrier(2), {}
    weighting = LossBasedReweighting("quadratic", 0.2, 0)
    whole = weighting(losses, {}, {})

    def over_threads(value, operation):
        told[threading.get_ident()] = value
        meeting.wait(10)
        both = torch.stack(list(told.values()))
        meeting.wait(10)
        return both.amax(0) if operation == "MAX" else both.sum(0)

    monkeypatch.setattr(loss_based_reweighting, "_over_processes", over_threads)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda part: weighting(part, {}, {}) * len(part), losses.split((5, 4)))
        torch.testing.assert_close(sum(found) / len(losses), whole)


@pytest.mark.parametrize("settings", [{"strategy": "upper"}, {"temperature": 0.0}])
def test_refuses_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LossBasedReweighting(**settings)
    with pytest.raises(ValueError, match="warmup_steps"):
        LossBasedReweighting(warmup_steps=-1)


def test_composes():
    run = assemble(
        compose(
            [
                *("task=digits", "model=mlp", "technique=loss_based_reweighting"),
                *("weighting.strategy=extremes", "weighting.temperature=0.5"),
            ]
        )
    )
    weighting = run.objective.weighting
    assert isinstance(weighting, LossBasedReweighting)
    assert (weighting.temperature, weighting.warmup_steps) == (0.5, 1000)
    assert [int(run.batches[step][0]["step"]) for step in (0, 7)] == [0, 7]
