"""Runs side by side."""

from pathlib import Path
from typing import Any

from training.configs import Config
from training.errors import UsageError
from training.folder import ELSEWHERE, read_config, read_summary
from training.metrics import read


def load(folder: Path) -> dict[str, Any]:
    """A run's folder as `run_dir`, `config`, `status`, `metrics` (last values) and `lines`.

    Raises:
        UsageError: when the folder is no run.
    """
    config, summary = read_config(folder), read_summary(folder)
    lines = read(folder / "metrics.jsonl")
    metrics: dict[str, float] = {}
    for line in lines:
        metrics |= line
    step = metrics.pop("step", 0)
    return {
        "run_dir": str(folder),
        "config": config,
        "status": summary.get("status", "unfinished"),
        "step": step,
        "metrics": metrics,
        "lines": lines,
    }


def differences(configs: list[Config]) -> dict[str, list[Any]]:
    """Configuration keys whose values differ, with each run's value (`None` where it has none)."""
    flat = [dict(_flatten(config)) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    return {
        key: [config.get(key) for config in flat]
        for key in keys
        if len({repr(config.get(key)) for config in flat}) > 1
        and key.split(".")[0] not in ELSEWHERE
    }


def labels(runs: list[dict[str, Any]]) -> list[str]:
    """A short name for each run, the folder's name where two would be the same."""
    names = [run["config"]["name"] for run in runs]
    if len(set(names)) == len(names):
        return names
    folders = [Path(run["run_dir"]).name for run in runs]
    if len(set(folders)) == len(folders):
        return folders
    return [run["run_dir"] for run in runs]


def check_metric(runs: list[dict[str, Any]], metric: str) -> None:
    """Refuse a metric that no run has.

    Raises:
        UsageError: naming the nearest that one has.
    """
    from training.errors import nearest

    known = {
        key.split("/", 1)[1] for run in runs for key in run["metrics"] if key.startswith("val/")
    } | {key.split("/", 1)[1] for run in runs for key in run["metrics"] if key.startswith("train/")}
    if metric not in known:
        raise UsageError(f"--metric: no run has '{metric}'{nearest(metric, known)}")


def _flatten(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict) or not node:
        return [(prefix, node)]
    found = []
    for key, value in node.items():
        found += _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found
