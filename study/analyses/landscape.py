"""Which of two minima is the flatter one."""

from pathlib import Path
from typing import Any

from study.analyses import BySeed, Table, by_arm
from study.probes.moving import kept


def flatter(table: Table, *, within: float = 0.25) -> BySeed:
    """By arm and seed, of runs with `study.probes.connectivity`: how much the loss rises, on
    average, over the share `within` of the line to the other run that is next to the run, less how
    much it does next to the other run; above 0 where the other run's minimum is the flatter one.

    Raises:
        ValueError: when no run has a line.
    """

    def measure(run: dict[str, Any]) -> float | None:
        arrays = kept(Path(run["run_dir"]), "connectivity")
        if arrays is None:
            return None
        losses = arrays["losses"]
        near = losses[: round(within * (len(losses) - 1)) + 1]
        far = losses[::-1][: len(near)]
        return float((near.mean() - near[0]) - (far.mean() - far[0]))

    found = by_arm(table, measure)
    if not found:
        raise ValueError("no run has probes/connectivity.npz (callbacks: Connectivity)")
    return found
