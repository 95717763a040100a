"""The generated series, and ensembles."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from tasks.fetch import fetch
from tasks.series import Series, fair_crps, forecasts, lorenz96, spikes, squared_error
from training.compose import compose
from training.errors import UsageError

SMALL = {"path": "lorenz96", "context_length": 4, "horizon": 3, "channels": ["x1", "x2"]}


def window(task, count=5, split="train"):
    rows = fetch(getattr(task, split), torch.arange(count))
    return task.prepare(rows, torch.Generator().manual_seed(0), False)


def test_lorenz96_solves_its_equation():
    """Against SciPy's eighth-order solver over 2 time units, and ẋ written as a loop."""
    table = lorenz96(steps=41).to_numpy()

    def slope(_, x):
        n = len(x)
        return [(x[(k + 1) % n] - x[k - 2]) * x[k - 1] - x[k] + 8 for k in range(n)]

    exact = solve_ivp(slope, (0, 2), table[0], "DOP853", [0.5, 1, 2], rtol=1e-10, atol=1e-10).y
    assert np.abs(table[10] - exact[:, 0]).max() < 0.01
    assert np.abs(table[20] - exact[:, 1]).max() < 0.05


def test_lorenz96_is_on_its_attractor_and_the_same_each_time():
    """The usual statistics: mean 2.34 and standard deviation 3.64 of every variable."""
    table = lorenz96()
    assert table.shape == (10_000, 40)
    assert table.columns[0] == "x1"
    assert table.to_numpy().mean() == pytest.approx(2.34, abs=0.05)
    assert table.std().to_numpy() == pytest.approx([3.64] * 40, abs=0.2)
    assert table.equals(lorenz96())


def test_lorenz96_as_a_task():
    task = Series(**SMALL)
    assert (len(task.train), len(task.validation)) == (7000 - 6, 1000 - 2)
    assert task.dims == {"in_features": 8, "out_features": 6}
    assert set(window(task)) == {"past_values", "labels"}
    with pytest.raises(UsageError, match="did you mean 'lorenz96'"):
        Series(path="lorenz69")


def test_an_ensembles_noise_is_a_standard_normal_of_the_generator():
    task = Series(**SMALL, members=3, noise_features=6)
    assert task.dims["noise_features"] == 6
    batch = window(task, 2000)
    assert batch["noise"].shape == (2000, 3, 6)
    assert batch["noise"].mean().item() == pytest.approx(0, abs=0.02)
    assert batch["noise"].std().item() == pytest.approx(1, abs=0.02)
    assert batch["noise"].equal(window(task, 2000)["noise"])


def test_scores_of_an_ensemble():
    """Against loops, from logits flat and not."""
    task = Series(**SMALL, members=4)
    labels = window(task)["labels"]
    generator = torch.Generator().manual_seed(1)
    members = torch.randn(5, 4, 3, 2, generator=generator)
    for logits in (members, members.flatten(2)):
        scores = task.scores({"logits": logits}, {"labels": labels})
        assert set(scores) == {"mse", "mae", "crps", "variance"}
        for i, j, k in np.ndindex(5, 3, 2):
            x, y = members[i, :, j, k].tolist(), labels[i, j, k].item()
            fair = sum(abs(a - y) for a in x) / 4 - sum(abs(a - b) for a in x for b in x) / 24
            expected = {
                "mse": (np.mean(x) - y) ** 2,
                "mae": abs(np.mean(x) - y),
                "crps": fair,
                "variance": np.var(x, ddof=1) * 5 / 4,
            }
            for name, value in expected.items():
                assert scores[name][i, j, k].item() == pytest.approx(value, abs=1e-5)
        loss = task.loss({"logits": logits}, {"labels": labels})
        torch.testing.assert_close(loss, (members - labels[:, None]).square().mean(1))


def test_spread_over_skill_is_one_where_the_label_is_as_likely_as_a_member():
    """For two members too, thanks to (M + 1)/M."""
    task = Series(**SMALL)
    generator = torch.Generator().manual_seed(0)
    for size in (2, 5):
        drawn = 3 * torch.randn(40_000, size + 1, 1, 1, generator=generator)
        scores = task.scores({"logits": drawn[:, 1:]}, {"labels": drawn[:, 0]})
        means = {name: value.mean().item() for name, value in scores.items()}
        assert task.derived(means)["spread_skill"] == pytest.approx(1, abs=0.02)
        # The CRPS of a normal distribution for labels of its own is σ/√π, whatever M.
        assert means["crps"] == pytest.approx(3 / math.sqrt(math.pi), rel=0.02)


def test_fair_crps_keeps_float64():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*s, generator=generator).double() for s in ((3, 6, 2), (3, 2)))
    pairs = (x[:, :, None] - x[:, None]).abs().sum((1, 2)) / (2 * 6 * 5)
    torch.testing.assert_close(
        fair_crps(x, y), (x - y[:, None]).abs().mean(1) - pairs, rtol=0, atol=1e-14
    )


def test_one_forecast_has_no_spread():
    task = Series(**SMALL)
    batch = window(task)
    outputs = {"logits": torch.zeros(5, 6)}
    scores = task.scores(outputs, batch)
    assert set(scores) == {"mse", "mae"}
    assert task.derived({"mse": 1.0, "mae": 1.0}) == {}
    assert forecasts(outputs, batch["labels"]).shape == (5, 1, 3, 2)
    torch.testing.assert_close(squared_error(outputs, batch), batch["labels"].square())


def test_spikes_are_in_the_training_part_alone():
    task, clean = Series(**SMALL), Series(**SMALL)
    assert spikes(task.train, task=task, fraction=0.1, size=10.0) is task.train
    change = task.values - clean.values
    boundary = 7000 - 4  # where the first window of validation begins
    assert (change[boundary:] == 0).all()
    hit = change[:boundary] != 0
    assert hit.float().mean().item() == pytest.approx(0.1, abs=0.01)
    torch.testing.assert_close(change[:boundary][hit].abs(), torch.full((int(hit.sum()),), 10.0))
    assert (change > 0).sum().item() == pytest.approx(hit.sum().item() / 2, rel=0.15)
    before, after = (window(t, 5, "validation")["past_values"] for t in (clean, task))
    assert before.equal(after)
    with pytest.raises(ValueError, match=r"^fraction"):
        spikes(task.train, task=task, fraction=1.5)


def test_config_and_mistakes():
    overrides = ["task=series", "task.path=lorenz96", "task.members=4", "model=stochastic"]
    node = compose(overrides)["task"]
    assert (node["members"], node["noise_features"]) == (4, 4)
    with pytest.raises(UsageError, match=r"task\.members"):
        Series(**SMALL, members=1)
    with pytest.raises(UsageError, match=r"task\.noise_features"):
        Series(**SMALL, members=2, noise_features=0)
