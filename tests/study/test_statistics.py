import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from study.statistics import (
    LEVEL,
    bca,
    bca_of_many,
    effect_size,
    holm,
    judge,
    power,
    seeds_needed,
    sign_flip,
    t_interval,
)

TRIALS = 10_000
DRAW = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "t3": lambda rng, shape: rng.standard_t(3, shape),
    "skewed": lambda rng, shape: rng.exponential(1, shape) - 1,
}


def reproduced_rates(differences):
    """How often BCa, t, and both lie above 0: `judge`'s rule on rows at once."""
    n = differences.shape[1]
    low, _ = bca_of_many(differences, LEVEL, 999, 0)
    reach = stats.t.ppf((1 + LEVEL) / 2, n - 1) * differences.std(1, ddof=1) / math.sqrt(n)
    student = differences.mean(1) - reach > 0
    return np.mean(low > 0), np.mean(student), np.mean((low > 0) & student)


def test_the_rates_rule_is_judges():
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((200, 5)) + 0.8
    ours = [
        judge(dict(enumerate(row)), dict.fromkeys(range(5), 0.0), direction="higher").outcome
        == "reproduced"
        for row in rows
    ]
    assert np.mean(ours) == pytest.approx(reproduced_rates(rows)[2], abs=0.01)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_no_difference_is_reproduced_at_most_at_the_nominal_rate(seeds):
    """2.5%: one side of a 95% interval; three standard errors for chance."""
    differences = np.random.default_rng(seeds).standard_normal((TRIALS, seeds))
    nominal = (1 - LEVEL) / 2
    alone, student, both = reproduced_rates(differences)
    chance = 3 * math.sqrt(nominal * (1 - nominal) / TRIALS)
    assert both <= nominal + chance
    assert student == pytest.approx(nominal, abs=chance)
    if seeds == 5:
        assert alone == pytest.approx(0.082, abs=0.003)  # what the module's docstring reports


@pytest.mark.parametrize(("kind", "most"), [("t3", 0.025), ("skewed", 0.025)])
def test_no_difference_of_other_distributions(kind, most):
    """Heavy tails make t cautious; so do these differences' many small and few large values."""
    differences = DRAW[kind](np.random.default_rng(0), (TRIALS, 5))
    assert reproduced_rates(differences)[2] <= most
    # Skewed the other way, few small values hide, and no interval from five seeds is right.
    if kind == "skewed":
        assert reproduced_rates(-differences)[2] == pytest.approx(0.114, abs=0.005)


@pytest.mark.parametrize(("effect", "seeds"), [(0.5, 10), (1.0, 5), (1.5, 8)])
def test_power_is_that_of_theory(effect, seeds):
    """By simulation, and the share that both intervals find is not far below."""
    differences = np.random.default_rng(1).standard_normal((TRIALS, seeds)) + effect
    _, student, both = reproduced_rates(differences)
    theory = power(effect, seeds)
    assert student == pytest.approx(theory, abs=3 * math.sqrt(0.25 / TRIALS))
    assert theory - 0.03 < both <= student


def test_bca_against_its_definition():
    """Efron's formulae with all 5⁵ resamples instead of random ones."""
    differences = np.array([0.3, -0.1, 0.8, 0.5, 1.9])
    means = np.sort([np.mean(s) for s in itertools.product(differences, repeat=5)])
    mean = differences.mean()
    z0 = stats.norm.ppf((np.sum(means < mean) + np.sum(means <= mean)) / 2 / len(means))
    jack = np.array([np.delete(differences, i).mean() for i in range(5)])
    spread = jack.mean() - jack
    a = np.sum(spread**3) / (6 * np.sum(spread**2) ** 1.5)
    z = stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(means, stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))))
    found = bca(differences)
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.07)  # of a grid of 0.02s


def test_t_interval_is_scipys():
    differences = np.array([0.3, -0.1, 0.8, 0.5])
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    found = t_interval(differences)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=7))
@settings(max_examples=50, deadline=None)
def test_sign_flip_by_brute_force(values):
    differences = np.array(values)
    flips = [abs(np.dot(s, differences)) for s in itertools.product((1, -1), repeat=len(values))]
    near = abs(differences.sum()) - 1e-9
    assert sign_flip(differences) <= np.mean([f >= near for f in flips]) + 1e-12
    assert sign_flip(differences) >= 2 / 2 ** len(values) - 1e-12


def test_sign_flip_of_many_seeds_is_near_the_t_tests():
    differences = np.random.default_rng(0).standard_normal(40) + 0.3
    expected = stats.ttest_1samp(differences, 0).pvalue
    assert sign_flip(differences) == pytest.approx(expected, abs=0.01)


def test_effect_size():
    """Hedges and Olkin's exact correction, Γ(m/2) / (√(m/2)·Γ((m − 1)/2)), m = n − 1."""
    differences = np.array([1.0, 2.0, 3.0, 5.0, 4.0, 3.5])
    m = 5
    exact = math.gamma(m / 2) / (math.sqrt(m / 2) * math.gamma((m - 1) / 2))
    expected = differences.mean() / differences.std(ddof=1) * exact
    assert effect_size(differences) == pytest.approx(expected, rel=0.01)
    assert effect_size(np.ones(4)) is None


def test_further_seeds_reach_the_power():
    differences = np.array([0.5, -0.4, 0.9, 0.1, 0.3])
    more = seeds_needed(differences)
    effect = differences.mean() / differences.std(ddof=1)
    assert power(effect, 5 + more) >= 0.8 > power(effect, 4 + more)
    assert seeds_needed(np.array([1.0, -1.0, 1e-4])) is None
    assert seeds_needed(np.zeros(3)) is None


def test_holms_example():
    """By hand: 0.01·4, 0.02·3, then 0.03·2 and 0.04·1 raised to what is before them."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_raises_and_keeps_the_order(p_values):
    corrected = holm(p_values)
    assert all(c >= p for c, p in zip(corrected, p_values))
    order = np.argsort(p_values, kind="stable")
    assert list(np.array(corrected)[order]) == sorted(corrected)
    assert max(corrected) <= 1


ARM, BASE = {s: 1.0 + 0.01 * s**2 for s in range(5)}, {s: 1.5 + 0.02 * s for s in range(5)}


def test_directions_mirror_one_another():
    lower, higher = judge(ARM, BASE), judge(ARM, BASE, direction="higher")
    assert (lower.outcome, higher.outcome) == ("reproduced", "contradicted")
    assert lower.mean == -higher.mean
    assert lower.t_interval.low == pytest.approx(-higher.t_interval.high)
    assert lower.p == pytest.approx(higher.p)


def test_units_scale_the_interval():
    one = judge(ARM, BASE)
    ten = judge({s: 10 * v for s, v in ARM.items()}, {s: 10 * v for s, v in BASE.items()})
    assert ten.interval.low == pytest.approx(10 * one.interval.low)
    assert ten.effect == pytest.approx(one.effect)


def test_pairs_are_by_seed():
    shuffled = dict(reversed(BASE.items())) | {99: 0.0}
    assert judge(ARM, shuffled) == judge(ARM, BASE)
    assert judge(ARM, BASE).seeds == 5


def test_margin_decides():
    mean = judge(ARM, BASE).mean
    assert judge(ARM, BASE, margin=2 * mean).outcome == "contradicted"
    assert judge(ARM, BASE, margin=mean).outcome == "inconclusive"


def test_equal_differences_are_a_point():
    base = {0: 1.0, 1: 2.0, 2: 4.0}
    verdict = judge({s: v - 0.5 for s, v in base.items()}, base)
    assert verdict.outcome == "reproduced"
    assert verdict.interval.low == verdict.interval.high == 0.5
    same = judge(base, base)
    assert (same.outcome, same.p, same.further_seeds) == ("inconclusive", 1.0, None)


def test_correction_can_unsettle():
    verdict = judge(ARM, BASE)
    assert verdict.corrected(0.04).outcome == "reproduced"
    assert verdict.corrected(0.06).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"technique": {0: 1.0}}, "technique"),
        ({"technique": {0: 1.0, 1: math.inf}}, "technique"),
        ({"direction": "down"}, "direction"),
    ],
)
def test_refusals(change, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        judge(**({"technique": ARM, "baseline": BASE} | change))
