"""What models weigh after steps of `post`, and what they lose.

A place is "ARM/STEP", the arm's model after that step, or "ARM", its model before the first; its
bytes are those of the packed file (`training.packing`).
"""

from typing import Any

import numpy as np

from study.analyses import BySeed, Table, by_arm


def ratio(table: Table, *, places: dict[str, str], to: str, metric: str = "bytes") -> BySeed:
    """By name and seed, a metric at a place over that at the place `to` with the same seed.

    Args:
        table: the runs.
        places: by name.
        to: a place.
        metric: "bytes", or as evaluation names it.

    Raises:
        ValueError: for a place where no run has the metric.
    """
    base = at(table, to, metric)
    return {
        name: {seed: v / base[seed] for seed, v in at(table, place, metric).items() if seed in base}
        for name, place in places.items()
    }


def at_bytes(
    table: Table, *, curves: dict[str, list[str]], size: float, metric: str = "val/loss"
) -> BySeed:
    """By curve and seed, the metric where the curve's model takes `size` bytes, between places on a
    straight line over log bytes.

    Args:
        table: the runs.
        curves: places by name.
        size: in bytes.
        metric: as evaluation names it.

    Raises:
        ValueError: for a place where no run has the metric, or a curve that does not reach `size`.
    """
    found: BySeed = {}
    for name, places in curves.items():
        for seed, points in curve(table, places, metric).items():
            x, y = np.array(sorted(points)).T
            if not x[0] <= size <= x[-1]:
                raise ValueError(f"size: {name} is from {x[0]:.0f} to {x[-1]:.0f} bytes")
            found.setdefault(name, {})[seed] = float(np.interp(np.log(size), np.log(x), y))
    return found


def curve(table: Table, places: list[str], metric: str) -> dict[int, list[tuple[float, float]]]:
    """By seed, bytes and metric of every place, in its order; of seeds that have all of them.

    Raises:
        ValueError: for a place where no run has the metric.
    """
    pairs = [(at(table, place, "bytes"), at(table, place, metric)) for place in places]
    seeds = set.intersection(*(set(part) for pair in pairs for part in pair))
    return {seed: [(x[seed], y[seed]) for x, y in pairs] for seed in sorted(seeds)}


def at(table: Table, place: str, metric: str) -> dict[int, float]:
    """By seed, a metric at a place.

    Raises:
        ValueError: when no run has it.
    """
    arm, _, step = place.partition("/")
    before = "post/bytes" if metric == "bytes" else metric
    name = f"post/{step}/{metric}" if step else before

    def own(run: dict[str, Any]) -> float | None:
        return run["metrics"].get(name) if run["arm"] == arm else None

    found = by_arm(table, own).get(arm)
    if not found:
        raise ValueError(f"places: no run of '{arm}' has '{name}'")
    return found
