"""What the variance between runs of one configuration is made of.

What is returned by seed are jackknife pseudo-values (`study.analyses.seeds`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from study.analyses import BySeed, Table
from study.analyses.seeds import predictions, pseudo_values
from study.plots import COLOURS, figure
from training.assemble import build_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Statistic = Callable[[list[np.ndarray]], float]
"""Of the rows of runs, one for each seed, each telling which test samples were right."""


def decomposition(table: Table, *, arms: list[str]) -> BySeed:
    """Test-set and distribution-wise variance of the accuracy, the mean over arms of each.

    With c the (runs, n) matrix of what was right, σ² the variance of its row means over runs and
    sᵢ² that of its i-th column, the variance of the accuracy on the distribution that the test set
    is drawn from has the unbiased estimate n/(n − 1)·(σ² − Σᵢ sᵢ²/n²). Were errors of different
    samples independent, σ² would be Σᵢ sᵢ²/n² and the estimate 0.

    Returns:
        `test`, σ; `independent`, what σ would be were errors independent; `share`, the estimate
        over σ² (it may be negative); `halves`, the correlation over runs of the accuracies on two
        halves of the test set, mean over 50 random splits; `error`, the mean error.

    Raises:
        ValueError: for an arm with fewer than three runs.

    Source: "Calibrated Chaos: Variance Between Runs of Neural Network Training is Harmless and
    Inevitable", arXiv 2304.01910; the estimate follows from E cov(cᵢ, cⱼ) = var(accuracy) for
    i ≠ j, as test samples are drawn independently.
    """
    rows = {arm: right(table, arm) for arm in arms}
    measures: dict[str, Statistic] = {
        "test": deviation,
        "independent": lambda c: float(np.sqrt(_independent(np.array(c)))),
        "share": share,
        "halves": halves,
        "error": lambda c: float(1 - np.mean(c)),
    }
    return {name: _mean_over(rows, measure) for name, measure in measures.items()}


def retained(table: Table, *, metric: str, to: str) -> BySeed:
    """By arm, the standard deviation of a metric over seeds as a fraction of that of the arm `to`.

    Raises:
        ValueError: for fewer than three seeds that have the metric in both arms.
    """
    values: dict[str, dict[int, float]] = {}
    for run in table:
        if metric in run["metrics"]:
            values.setdefault(run["arm"], {})[run["seed"]] = run["metrics"][metric]
    base = values.pop(to, {})
    found: BySeed = {}
    for arm, own in values.items():
        pairs = {seed: np.array([own[seed], base[seed]]) for seed in own if seed in base}
        found[arm] = pseudo_values(pairs, _ratio, arm)
    return found


def calibrated(table: Table, *, arm: str, metric: str = "val/accuracy") -> BySeed:
    """`ratio`: the standard deviation of a two-class accuracy over seeds, over the √(e/2n) that it
    is for the mean error e on n test samples when the ensemble of all runs is calibrated and errors
    are independent; and `error`, e.

    Then a sample is put in class 1 by a share q of the runs and is of class 1 with probability q,
    so that the variance over runs, q(1 − q), is in the mean half the error, 2q(1 − q).

    Raises:
        ValueError: for fewer than three seeds, or a task with other than two classes.
    """
    runs, values = _scanned(table, arm, metric)
    task = build_task(runs[0]["config"]["task"])
    if task.dims.get("num_classes", task.dims.get("out_features")) != 2:
        raise ValueError(f"arm: '{arm}' is not of two classes")
    n = len(task.validation)

    def ratio(accuracies: list[float]) -> float:
        error = 1 - np.mean(accuracies)
        return float(np.std(accuracies, ddof=1) / np.sqrt(error / (2 * n)))

    errors = {seed: 1 - value for seed, value in values.items()}
    return {"ratio": pseudo_values(values, ratio, arm), "error": errors}


def extremes(table: Table, *, arm: str, metric: str = "val/accuracy", of: int = 10) -> BySeed:
    """How far the scan of an arm's seeds reaches.

    Returns:
        `deviation`, the standard deviation of the metric, an accuracy; `noise`, it over
        √(p(1 − p)/n), that of a model of accuracy p over test sets of n samples; `best`, the
        expectation of the highest of `of` seeds drawn without replacement, above the mean; `worst`,
        that of the lowest, below it; `range`, highest less lowest of all, the same for each seed.

    Raises:
        ValueError: when there are not more than `of` seeds.

    Source: "Torch.manual_seed(3407) is all you need", arXiv 2109.08203, which scans seeds.
    """
    runs, values = _scanned(table, arm, metric)
    if len(values) <= of:
        raise ValueError(f"of: needs more than {of} seeds of '{arm}', has {len(values)}")
    n = len(build_task(runs[0]["config"]["task"]).validation)

    def noise(found: list[float]) -> float:
        p = np.mean(found)
        return float(np.std(found, ddof=1) / np.sqrt(p * (1 - p) / n))

    measures: dict[str, Callable[[list[float]], float]] = {
        "deviation": lambda v: float(np.std(v, ddof=1)),
        "noise": noise,
        "best": lambda v: highest(np.array(v), of) - float(np.mean(v)),
        "worst": lambda v: highest(-np.array(v), of) + float(np.mean(v)),
    }
    found = {name: pseudo_values(values, measure, arm) for name, measure in measures.items()}
    reach = max(values.values()) - min(values.values())
    return {**found, "range": dict.fromkeys(values, reach)}


def highest(values: np.ndarray, count: int) -> float:
    """The expectation of the highest of `count` of the values, drawn without replacement: the k-th
    lowest is it in (k − 1 choose count − 1) of all (len choose count) draws."""
    ordered, chance, mean = np.sort(values)[::-1], count / len(values), 0.0
    for place, value in enumerate(ordered[: len(values) - count + 1]):
        mean += chance * value
        chance *= (len(values) - place - count) / (len(values) - place - 1 or 1)
    return float(mean)


def reach(table: Table, *, arm: str, metric: str = "val/accuracy") -> "Figure":
    """A histogram of the metric over an arm's seeds, beside the expected highest and lowest of n
    of them, drawn without replacement."""
    values = np.array(list(_scanned(table, arm, metric)[1].values()))
    drawn = figure(10, 4)
    left, side = drawn.subplots(1, 2)
    left.hist(values, bins=12, color=COLOURS[0], alpha=0.6)
    left.axvline(values.mean(), color=COLOURS[6], lw=1)
    left.set_xlabel(metric)
    left.set_ylabel(f"seeds of {len(values)}")
    counts = np.unique(np.geomspace(1, len(values), 24).astype(int))
    for sign, label, colour in ((1, "highest", COLOURS[2]), (-1, "lowest", COLOURS[1])):
        found = [sign * highest(sign * values, int(count)) for count in counts]
        side.plot(counts, found, color=colour, marker="o", ms=3, label=f"expected {label}")
    side.axhline(values.mean(), color=COLOURS[6], lw=1, label="mean")
    side.set_xscale("log")
    side.set_xlabel("seeds scanned")
    side.set_ylabel(metric)
    side.legend(frameon=False, fontsize=8)
    for axes in (left, side):
        axes.grid(alpha=0.25)
    return drawn


def right(table: Table, arm: str) -> dict[int, np.ndarray]:
    """By seed, which validation samples the arm's last models put in their class, float64 (n,).

    Raises:
        ValueError: when no run of the arm has ended.
    """
    runs = [run for run in table if run["arm"] == arm and run["metrics"]]
    if not runs:
        raise ValueError(f"arms: no run of '{arm}' has ended")
    labels = np.asarray(build_task(runs[0]["config"]["task"]).validation["labels"])
    return {run["seed"]: (predictions(run) == labels).astype(float) for run in runs}


def deviation(rows: list[np.ndarray]) -> float:
    """The standard deviation over runs of the accuracy."""
    return float(np.std(np.mean(rows, axis=1), ddof=1))


def share(rows: list[np.ndarray]) -> float:
    """The distribution-wise variance over that on the test set; 0 where that is 0."""
    correct, samples = np.array(rows), rows[0].size
    test = float(np.var(correct.mean(1), ddof=1))
    return samples / (samples - 1) * (1 - _independent(correct) / test) if test else 0.0


def halves(rows: list[np.ndarray], splits: int = 50) -> float:
    """The correlation over runs of the accuracies on two halves, mean over random splits; one in
    which they do not vary counts 0."""
    correct, rng, found = np.array(rows), np.random.default_rng(0), []
    for _ in range(splits):
        order = rng.permutation(correct.shape[1])
        middle = len(order) // 2
        first, second = correct[:, order[:middle]].mean(1), correct[:, order[middle:]].mean(1)
        vary = np.ptp(first) > 0 and np.ptp(second) > 0
        found.append(float(np.corrcoef(first, second)[0, 1]) if vary else 0.0)
    return float(np.mean(found))


def accuracies(table: Table, *, arm: str) -> "Figure":
    """The accuracies of an arm's runs on the validation set as a histogram, with the distribution
    that they would have were errors of different samples independent, each with its own rate."""
    correct = np.array(list(right(table, arm).values()))
    n = correct.shape[1]
    counts = correct.sum(1)
    expected = len(counts) * of_independent(correct.mean(0))
    drawn = figure(8, 4)
    axes = drawn.add_subplot()
    lowest, highest_ = int(counts.min()) - 4, int(counts.max()) + 4
    edges = np.arange(lowest, highest_ + 2, 2)
    places = [int(edge) for edge in edges[:-1]]
    axes.hist(counts / n, bins=(edges - 0.5) / n, color=COLOURS[0], alpha=0.6, label="runs")
    sums = [expected[place : place + 2].sum() for place in places]
    middles = [(place + 0.5) / n for place in places]
    axes.plot(middles, sums, color=COLOURS[1], marker="o", ms=4, label="independent errors")
    axes.set_xlabel("val/accuracy")
    axes.set_ylabel(f"runs of {len(counts)}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return drawn


def of_independent(rates: np.ndarray) -> np.ndarray:
    """The probabilities of 0 to n successes of n independent trials with these rates (n,):
    Poisson's binomial distribution, (n + 1,)."""
    found = np.ones(1)
    for rate in rates:
        found = np.convolve(found, [1 - rate, rate])
    return found


def _scanned(table: Table, arm: str, metric: str) -> tuple[list[dict[str, Any]], dict[int, float]]:
    runs = [r for r in table if r["arm"] == arm and metric in r["metrics"]]
    if not runs:
        raise ValueError(f"arm: no run of '{arm}' has '{metric}'")
    return runs, {run["seed"]: float(run["metrics"][metric]) for run in runs}


def _independent(correct: np.ndarray) -> float:
    return float(np.var(correct, axis=0, ddof=1).sum() / correct.shape[1] ** 2)


def _ratio(pairs: list[np.ndarray]) -> float:
    own, base = np.std(pairs, axis=0, ddof=1)
    return float(own / base) if base else 0.0


def _mean_over(rows: dict[str, dict[int, np.ndarray]], measure: Statistic) -> dict[int, float]:
    """Pseudo-values of a statistic, the mean over arms, of the seeds that all of them have."""
    own = [pseudo_values(of_arm, measure, arm) for arm, of_arm in rows.items()]
    common = set.intersection(*(set(values) for values in own))
    return {seed: float(np.mean([values[seed] for values in own])) for seed in sorted(common)}
