"""What a gradient estimator adds in noise, and takes in computation."""

from study.analyses import BySeed, Table, by_arm


def noise(table: Table) -> BySeed:
    """By arm and seed, the variance of the estimator over that of exact gradients of mini-batches,
    when `study.probes.estimator.Estimator` last measured them."""

    def ratio(run: dict) -> float | None:
        own, batch = (
            run["metrics"].get(f"estimator/{name}") for name in ("variance", "batch_variance")
        )
        return own / batch if own is not None and batch else None

    return by_arm(table, ratio)


def flops(table: Table, *, baseline: str, measuring: str | None = None) -> BySeed:
    """By arm and seed, the FLOPs of training over those of the arm `baseline` with that seed: all
    gradients' (`study.probes.flops.GradientFlops`), and what the metric `measuring` adds at each
    of its records.

    Raises:
        ValueError: for another baseline than an arm that has them.
    """

    def total(run: dict) -> float | None:
        own = run["metrics"].get("probe/gradient_flops")
        return own and own + sum(line.get(measuring, 0.0) for line in run["lines"])

    found = by_arm(table, total)
    if baseline not in found:
        raise ValueError(f"baseline: no arm '{baseline}' with probe/gradient_flops")
    ones = found[baseline]
    return {
        arm: {seed: value / ones[seed] for seed, value in own.items() if seed in ones}
        for arm, own in found.items()
    }
