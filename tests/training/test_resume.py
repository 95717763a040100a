"""A run killed at any moment and resumed ends in the same bits as one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.catalog import ROOT
from training.metrics import read

STEPS = 240
TINY = [
    *("model.width=16", "model.depth=1", "model.heads=2", "task.context_length=16"),
    *("trainer.batch_size=8", "trainer.eval_samples=16", "trainer.log_every=1"),
    *(f"trainer.max_steps={STEPS}", "trainer.eval_every=32", "trainer.checkpoint_every=5"),
    *("tracker=none", "trainer.device=cpu"),
]
STATEFUL_TECHNIQUES = (
    *("pade_activation_unit", "power_norm", "entropy_guided_attention", "loss_free_balancing"),
    *("lsuv", "sigma_reparam", "goldfish_loss", "gradient_noise", "adamp", "grades"),
    "spectral_alignment",
)
"""One of each slot, with parameters, buffers, counters or random numbers of its own."""
STATEFUL = [f"technique=[{','.join(STATEFUL_TECHNIQUES)}]"]


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cli", "run", "--quiet", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(arguments: list[str], folder: Path) -> Path:
    """Train to the end and return the run's folder."""
    process = start(arguments, folder)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    (run,) = (folder / "outputs" / "runs").iterdir()
    return run


def kill_at(step: int, arguments: list[str], folder: Path) -> int:
    """Start a run, SIGKILL it at a step, or soon after, and return the last step it wrote."""
    process = start(arguments, folder)
    while process.poll() is None and last_step(folder) < step:
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()[0]
    time.sleep(random.uniform(0, 0.02))  # somewhere within a step, or within a checkpoint
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return last_step(folder)


def last_step(folder: Path) -> int:
    found = list(folder.glob("outputs/runs/*/metrics.jsonl"))
    lines = read(found[0]) if found else []
    return lines[-1]["step"] if lines else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "kills"), [([], 10), (STATEFUL, 4)], ids=["plain", "stateful techniques"]
)
def test_killed_and_resumed_equals_uninterrupted(overrides, kills, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = finish(TINY + overrides, tmp_path / "whole")
    steps = sorted(random.sample(range(3, STEPS - 60), kills))
    points = [kill_at(steps[0], TINY + overrides, tmp_path / "killed")]
    (run,) = (tmp_path / "killed" / "outputs" / "runs").iterdir()
    for step in steps[1:]:
        # A step further each time, counting from where the last kill left it.
        target = max(step, points[-1] + 1)
        points.append(kill_at(target, ["--resume", str(run)], tmp_path / "killed"))
    finish(["--resume", str(run)], tmp_path / "killed")
    assert len(set(points)) == kills, points
    final = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    assert (run / final).read_bytes() == (whole / final).read_bytes(), points
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text(), points
