"""Recorded results: `recipes/results/<name>.json`, and the table made from them."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.recipe import RECIPES
from training.environment import describe
from training.files import write_atomically

if TYPE_CHECKING:
    from study.reproduce import Study

RESULTS = RECIPES / "results"


def save(result: dict[str, Any], study: "Study", profile: str) -> Path:
    """Keep a result with the machine, the versions and the command it came from."""
    runs = [trial for trial in [*study.tuning, *study.trials] if trial.values()]
    command = ["assay", "reproduce", study.recipe.name]
    if profile != "small":
        command += ["--profile", profile]
    if study.seeds != study.recipe.seeds:
        command += ["--seeds", str(len(study.seeds))]
    kept = {
        **result,
        "paper": study.recipe.paper,
        "profile": profile,
        "metric": study.recipe.metric,
        "command": shlex.join(command),
        "minutes": round(sum(t.values()["seconds"] for t in runs) / 60, 1),
        "environment": describe(),
        "tuning": [_without_paths(row) for row in result["tuning"]],
        "runs": [_without_paths(row) for row in result["runs"]],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{study.recipe.name}.json"
    write_atomically(path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    return path


def _without_paths(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "run_dir"}
