"""What is lost when the adapters of several tasks are added up."""

from pathlib import Path
from typing import Any

import torch

from study.analyses import BySeed, Table
from techniques.reparam.adapters import adapters
from training.evaluate import evaluate
from training.run import Run
from training.trained import trained


def crosstalk(table: Table, *, families: dict[str, list[str]]) -> BySeed:
    """By family and seed, the mean over tasks of `val/loss` after merging less that before.

    The runs of a family's arms have started from one base and have adapters alone; the base gets
    the sum of their changes and is evaluated on each run's task.

    Args:
        table: the runs.
        families: arms, one a task, by name.

    Raises:
        ValueError: for an arm that is not there, or a run without adapters.
    """
    found: BySeed = {}
    for family, arms in families.items():
        by_seed: dict[int, list[dict[str, Any]]] = {}
        for run in table:
            if run["arm"] in arms and run["metrics"]:
                by_seed.setdefault(run["seed"], []).append(run)
        if not by_seed:
            raise ValueError(f"no finished run of the arms {', '.join(arms)}")
        found[family] = {
            seed: _loss_added(runs) for seed, runs in by_seed.items() if len(runs) == len(arms)
        }
    return found


@torch.no_grad()
def _loss_added(rows: list[dict[str, Any]]) -> float:
    runs = [restored(row) for row in rows]
    before = [evaluate(run)["val/loss"] for run in runs]
    changes = [_changes(run) for run in runs]
    for own, run in zip(changes, runs):
        for name, layer in _layers(run).items():
            others = [theirs[name] for theirs in changes if theirs is not own]
            layer.parametrizations.weight.original.add_(sum(others))
    after = [evaluate(run)["val/loss"] for run in runs]
    return sum(after) / len(after) - sum(before) / len(before)


def restored(row: dict[str, Any]) -> Run:
    """A run of the table, with its last weights."""
    return trained(Path(row["run_dir"]), row["config"])[0]


def _layers(run: Run) -> dict[str, Any]:
    found = {name: run.model.get_submodule(name) for name in adapters(run.model)}
    if not found:
        raise ValueError(f"the run {run.config['name']} has no adapters")
    return found


def _changes(run: Run) -> dict[str, torch.Tensor]:
    """What each layer's adapter adds to its weight."""
    return {
        name: layer.weight - layer.parametrizations.weight.original
        for name, layer in _layers(run).items()
    }
