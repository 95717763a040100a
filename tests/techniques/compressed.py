"""A small trained model, and what steps after training make of it."""

import json
from pathlib import Path

from tests.cli.invoke import invoke
from training.assemble import assemble
from training.compose import compose
from training.metrics import read
from training.run import Run

TINY = [
    *("task=digits", "model=mlp", "model.width=32", "tracker=none", "trainer.batch_size=16"),
    *("trainer.max_steps=12", "schedule.warmup=0", "trainer.device=cpu", "trainer.eval_samples=64"),
]


def run_of(*overrides: str) -> Run:
    """Its parts, untrained."""
    return assemble(compose([*TINY, *overrides]))


def lines(outputs: Path, *overrides: str) -> tuple[Path, dict[str, float]]:
    """The folder of a run with these overrides, and the last value of all it has recorded."""
    result = invoke("run", *TINY, *overrides, f"outputs={outputs}", "--json")
    assert result.code == 0, result.err
    folder = Path(json.loads(result.out.splitlines()[-1])["run_dir"])
    folder = outputs / "runs" / folder.name
    return folder, {k: v for line in read(folder / "metrics.jsonl") for k, v in line.items()}
