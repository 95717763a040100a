"""Tiny runs of a technique on its natural task."""

from pathlib import Path
from typing import Any

from training.assemble import assemble
from training.compose import compose
from training.configs import card
from training.metrics import read
from training.parallel import local
from training.progress import Progress
from training.run import Run
from training.tracking import NoTracker
from training.trainer import fit

TINY = {
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "task.context_length": 32,
    "trainer.batch_size": 8,
    "trainer.eval_samples": 8,
    "trainer.log_every": 1,
    "schedule.warmup": 0,
}


def tiny(technique: str, outputs: Path, *extra: str) -> tuple[dict[str, Any], list[str]]:
    """Configuration and overrides of the technique's natural run, made small.

    A natural override is kept as it is; the keys of `TINY` shrink what it leaves, where there.
    """
    natural = [*card(technique)["natural"], f"technique={technique}"]
    config = compose(natural)
    shrunk = []
    for key, value in TINY.items():
        part, leaf = key.split(".")
        if leaf in config[part] and not any(o.startswith(f"{key}=") for o in natural):
            shrunk.append(f"{key}={value}")
    overrides = [*natural, *shrunk, "tracker=none", "trainer.device=cpu", f"outputs={outputs}"]
    overrides += extra
    return compose(overrides), overrides


def fitted(technique: str, outputs: Path, *extra: str, post: bool = True) -> tuple[Run, bool]:
    """A trained tiny run, and whether training changed a parameter; its steps after training are
    left out on request."""
    run = assemble(tiny(technique, outputs, *extra)[0])
    run.post = run.post if post else {}
    outputs.mkdir(exist_ok=True)
    run.open(outputs)
    before = [local(p.detach()).clone() for p in run.objective.parameters()]
    status = fit(run, NoTracker(), Progress())
    assert status == "completed", f"{status}: {run.stopped}"
    changed = any(not local(p).equal(b) for p, b in zip(run.objective.parameters(), before))
    return run, changed


def losses(outputs: Path) -> list[float]:
    """The training loss of each step, which `fitted` has written."""
    return [line["train/loss"] for line in read(outputs / "metrics.jsonl") if "train/loss" in line]
