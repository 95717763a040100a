"""How far arms lie apart, and in which order."""

import math

from scipy.stats import rankdata

from study.analyses import BySeed, Table, by_arm


def spread(table: Table, *, metric: str, groups: dict[str, list[str]] | None = None) -> BySeed:
    """By group of arms and by seed, the seed's value of the arm whose mean over seeds is best, less
    that of the one whose mean is worst; `all` is every arm.

    Which arms these are is chosen on the same seeds, so for arms that do not differ it is above 0:
    about 2 standard errors of a mean for five arms, 4 for twenty.

    Args:
        table: the runs.
        metric: larger is better.
        groups: arms by name of the group.

    Raises:
        ValueError: for an arm that is not there.
    """
    values = by_arm(table, lambda run: run["metrics"].get(metric))
    found: BySeed = {}
    for name, arms in {"all": list(values), **(groups or {})}.items():
        missing = [arm for arm in arms if arm not in values]
        if missing:
            raise ValueError(f"groups.{name}: no finished run of arm '{missing[0]}'")
        ranked = sorted(arms, key=lambda arm: sum(values[arm].values()) / len(values[arm]))
        worst, best = values[ranked[0]], values[ranked[-1]]
        found[name] = {seed: best[seed] - worst[seed] for seed in best if seed in worst}
    return found


def ranks(
    table: Table, *, metric: str, groups: dict[str, list[str]], direction: str = "lower"
) -> BySeed:
    """Of methods that are tried on several sets, by group of methods and by seed: the group's mean
    rank on the set where that is worst. Arms are called METHOD-SET; 1 is the best rank on a set,
    methods that tie share the mean of theirs, and a value that is not a number is the worst.

    A group of n methods drawn at random has the rank (methods + 1)/2 on average on each set, and
    more on the worst.

    Args:
        table: the runs.
        metric: what is ranked, each seed by itself.
        groups: methods by name of the group.
        direction: which values are good; lower or higher.

    Raises:
        ValueError: for another direction, or a method that has no run on some set.
    """
    if direction not in ("lower", "higher"):
        raise ValueError(f"direction: expected lower or higher, got {direction!r}")
    sign = 1 if direction == "lower" else -1
    cells: dict[tuple[int, str], dict[str, float]] = {}
    for arm, values in by_arm(table, lambda run: run["metrics"].get(metric)).items():
        method, _, name = arm.rpartition("-")
        for seed, value in values.items():
            worse = math.inf if math.isnan(value) else sign * value
            cells.setdefault((seed, name), {})[method] = worse
    found: BySeed = {group: {} for group in groups}
    for (seed, name), values in cells.items():
        order = dict(zip(values, rankdata(list(values.values()))))
        for group, methods in groups.items():
            missing = [method for method in methods if method not in order]
            if missing:
                raise ValueError(f"groups.{group}: no finished run of arm '{missing[0]}-{name}'")
            mean = float(sum(order[method] for method in methods) / len(methods))
            found[group][seed] = max(mean, found[group].get(seed, mean))
    return found
