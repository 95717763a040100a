"""What the law of mixtures predicts, and which mixture of domains it would train on."""

from collections.abc import Sequence

import numpy as np

from study.analyses import BySeed, Table, laws
from study.laws.mixture import optimum


def predicted(table: Table, *, targets: Sequence[str], held_out: Sequence[str]) -> BySeed:
    """The law `mixture` fitted to each target's loss, and the held-out arm it predicts the lowest
    loss for.

    Args:
        table: the runs, of which held-out ones differ in their mixture alone.
        targets: metrics, such as a domain's loss.
        held_out: arms or patterns, predicted and not fitted.

    Returns:
        By seed, of each target `<target>_fitted` and `<target>_error`, means over fitted and
        held-out runs of |predicted − measured| / measured, and `<target>_<domain>`, the law's
        optimal weights; and, means over targets, `chosen`, the measured loss of the arm that is
        predicted to be best; `best`, the lowest that was measured; `average`, the mean over
        held-out arms, what one drawn at random has; `order`, Spearman's correlation over held-out
        arms of predicted and measured loss.
    """
    from scipy.stats import spearmanr

    found: dict[str, dict[int, list[float]]] = {}
    for target in targets:
        arguments = {"law": "mixture", "metric": target, "held_out": held_out}
        for seed, result, _ in laws.by_seed(table, **arguments):
            expected = result.predicted[result.held_out]
            measured = result.measured[result.held_out]
            numbers = {
                "chosen": measured[expected.argmin()],
                "best": measured.min(),
                "average": measured.mean(),
                "order": spearmanr(expected, measured)[0],
            }
            name = target.removeprefix("val/loss_")
            errors = {"fitted": result.fitted_error, "error": result.error}
            numbers |= {f"{name}_{key}": error for key, error in errors.items()}
            numbers |= {f"{name}_{d}": share for d, share in optimum(result.values).items()}
            for key, value in numbers.items():
                found.setdefault(key, {}).setdefault(seed, []).append(value)
    return {
        key: {seed: float(np.mean(values)) for seed, values in seeds.items()}
        for key, seeds in found.items()
    }
