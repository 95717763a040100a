"""From paired differences to a verdict.

A claim says in which direction a technique moves a metric. For every seed both arms have, the
difference is oriented so that positive favours the claim. The claim is *reproduced* when the
interval of the mean difference lies above the claim's margin, *contradicted* when below, else
*inconclusive*.

The interval is the hull of the BCa bootstrap's and Student's t: BCa alone is too narrow for few
seeds (with 5 normal differences of mean 0 its 95% interval lies above 0 in 8.2% of 10,000 trials
instead of 2.5%; `tests/study/test_statistics.py`), and t alone relies on normality. The hull's rate
is at most t's, which is exact for normal differences.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.95
POWER = 0.8
MOST_SEEDS = 1000
RESAMPLES = 10_000
REPRODUCED, CONTRADICTED, INCONCLUSIVE = "reproduced", "contradicted", "inconclusive"


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`, in the metric's units."""

    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What paired runs say of a claim.

    Attributes:
        outcome: `"reproduced"`, `"contradicted"` or `"inconclusive"`.
        mean: difference, in the metric's units; positive favours the claim.
        margin: what it had to exceed.
        interval: the deciding 95% interval, the hull of `bca` and `t_interval`.
        bca, t_interval: each by itself.
        p: of the two-sided paired t-test of mean = margin.
        sign_flip: of the two-sided sign-flip permutation test of the same.
        effect: Hedges' g of the paired differences; None where they are all equal.
        seeds: pairs.
        further_seeds: how many more would settle an inconclusive claim with 80% power, if the mean
            and spread stay as they are; None where more than 1,000, or settled.
    """

    outcome: str
    mean: float
    margin: float
    interval: Interval
    bca: Interval
    t_interval: Interval
    p: float
    sign_flip: float
    effect: float | None
    seeds: int
    further_seeds: int | None

    def corrected(self, p: float) -> "Verdict":
        """The same with a p-value corrected for several claims, which may unsettle it."""
        settled = self.outcome if p < 1 - LEVEL else INCONCLUSIVE
        return replace(self, p=p, outcome=settled)

    def sentence(self) -> str:
        """The verdict in words."""
        low, high = self.interval.low, self.interval.high
        text = f"{self.outcome}: {self.mean:+.4g} [{low:+.4g}, {high:+.4g}], {self.seeds} seeds"
        if self.margin:
            text += f", margin {self.margin:g}"
        if self.further_seeds:
            text += f"; about {self.further_seeds} more seeds would settle it"
        return text


def judge(
    technique: Mapping[int, float],
    baseline: Mapping[int, float],
    *,
    direction: str = "lower",
    margin: float = 0.0,
    level: float = LEVEL,
) -> Verdict:
    """Judge a claim from a metric by seed of both arms.

    Args:
        technique, baseline: values by seed; only seeds in both count.
        direction: `"lower"` when the claim says that the technique's are lower, or `"higher"`.
        margin: by how much, in the metric's units.
        level: of the interval.

    Raises:
        ValueError: for fewer than two common seeds, a value that is not finite, or another
            direction.
    """
    if direction not in ("lower", "higher"):
        raise ValueError(f"direction: lower or higher, got {direction!r}")
    common = sorted(set(technique) & set(baseline))
    if len(common) < 2:
        raise ValueError(f"technique: expected at least two seeds of the baseline's, got {common}")
    sign = -1.0 if direction == "lower" else 1.0
    differences = sign * np.array([technique[s] - baseline[s] for s in common], dtype=float)
    if not np.isfinite(differences).all():
        raise ValueError("technique: expected finite values")
    student, boot = t_interval(differences, level), bca(differences, level)
    hull = Interval(min(student.low, boot.low), max(student.high, boot.high))
    outcome = INCONCLUSIVE
    if hull.low > margin:
        outcome = REPRODUCED
    elif hull.high < margin:
        outcome = CONTRADICTED
    further = seeds_needed(differences - margin, level) if outcome == INCONCLUSIVE else None
    return Verdict(
        outcome=outcome,
        mean=float(differences.mean()),
        margin=margin,
        interval=hull,
        bca=boot,
        t_interval=student,
        p=t_test(differences - margin),
        sign_flip=sign_flip(differences - margin),
        effect=effect_size(differences),
        seeds=len(common),
        further_seeds=further,
    )


def t_interval(differences: np.ndarray, level: float = LEVEL) -> Interval:
    """Student's interval of the mean, exact for normal differences."""
    n = len(differences)
    error = differences.std(ddof=1) / math.sqrt(n)
    reach = stats.t.ppf((1 + level) / 2, n - 1) * error
    mean = differences.mean()
    return Interval(float(mean - reach), float(mean + reach))


def bca(
    differences: np.ndarray, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron, 1987).

    Where it is not defined, as for differences that are all equal, the mean itself.
    """
    low, high = bca_of_many(differences[None], level, resamples, seed)
    return Interval(float(low[0]), float(high[0]))


def bca_of_many(
    differences: np.ndarray, level: float, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`bca` of each row of (trials, seeds)."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of degenerate rows, which are seen to below
        found = stats.bootstrap(
            (differences,),
            np.mean,
            axis=-1,
            vectorized=True,
            confidence_level=level,
            n_resamples=resamples,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    mean = differences.mean(-1)
    return tuple(np.where(np.isnan(end), mean, end) for end in (found.low, found.high))  # type: ignore[return-value]


def t_test(differences: np.ndarray) -> float:
    """Two-sided p-value of the t-test of mean 0."""
    if np.ptp(differences) == 0:
        return 0.0 if differences[0] else 1.0
    return float(stats.ttest_1samp(differences, 0).pvalue)  # type: ignore[attr-defined]


def sign_flip(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of mean 0 over all flips of the differences' signs, or 99,999 random ones
    beyond 16 seeds. Exact for distributions symmetric about 0; never below 2/2ⁿ."""
    n = len(differences)
    if n <= 16:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
        flipped = np.abs((1 - 2 * bits) @ differences)
        return float(np.mean(flipped >= abs(differences.sum()) * (1 - 1e-12)))
    signs = np.random.default_rng(seed).choice((-1, 1), size=(99_999, n))
    flipped = np.abs(signs @ differences)
    return float((1 + (flipped >= abs(differences.sum()) * (1 - 1e-12)).sum()) / 100_000)


def effect_size(differences: np.ndarray) -> float | None:
    """Mean over standard deviation, times Hedges' correction 1 − 3/(4(n − 1) − 1) for few seeds."""
    spread = differences.std(ddof=1)
    if not spread:
        return None
    return float(differences.mean() / spread * (1 - 3 / (4 * (len(differences) - 1) - 1)))


def power(effect: float, seeds: int, level: float = LEVEL) -> float:
    """Chance that the two-sided t-interval excludes 0 on the effect's side.

    Args:
        effect: true mean over true standard deviation.
        seeds: pairs.
    """
    critical = stats.t.ppf((1 + level) / 2, seeds - 1)
    return float(stats.nct.sf(critical, seeds - 1, abs(effect) * math.sqrt(seeds)))


def seeds_needed(differences: np.ndarray, level: float = LEVEL) -> int | None:
    """Further seeds for 80% power, at the observed mean and spread; None where over 1,000."""
    spread = differences.std(ddof=1)
    if not spread or not differences.mean():
        return None
    effect = abs(differences.mean() / spread)
    if power(effect, MOST_SEEDS, level) < POWER:
        return None
    low, high = 2, MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, middle, level) >= POWER else (middle + 1, high)
    return max(low - len(differences), 1)


def holm(p_values: list[float]) -> list[float]:
    """Holm's corrected p-values: the k-th smallest of m times m − k + 1, made to rise."""
    order = np.argsort(p_values)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
