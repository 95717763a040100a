"""Analyses for a recipe's claims: functions of the table of runs.

A table is a list of runs, each a dict with `arm`, `seed`, `metrics` (last values), `config`,
`lines` (of `metrics.jsonl`) and `run_dir`; a run without an end has no metrics. An analysis returns
numbers by key, or by key and seed.
"""

from collections.abc import Callable, Mapping
from typing import Any

Table = list[dict[str, Any]]
BySeed = dict[str, dict[int, float]]


def by_arm(table: Table, measure: Callable[[dict[str, Any]], float | None]) -> BySeed:
    """`measure` of every finished run by arm and seed; runs of which it is `None` are left out."""
    found: BySeed = {}
    for run in table:
        value = measure(run) if run["metrics"] else None
        if value is not None:
            found.setdefault(run["arm"], {})[run["seed"]] = value
    return found


def add(found: BySeed, seed: int, numbers: Mapping[str, Any]) -> None:
    """Put a seed's numbers, by key, with those of others."""
    for key, value in numbers.items():
        found.setdefault(key, {})[seed] = float(value)


def setting(run: dict[str, Any], key: str) -> Any:
    """The value of a key of a run's configuration, such as `model.depth`."""
    value: Any = run["config"]
    for part in key.split("."):
        value = value[part]
    return value
