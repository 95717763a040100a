"""Every technique found in `conf/technique/` against every column of the matrix.

What a technique cannot do it declares under `unsupported` in its card, with the reason.
`python -m tests.conformance` runs this and records the matrix that
`assay list techniques --matrix` prints.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.conformance.runs import fitted, losses, tiny
from training import checkpoint
from training.assemble import assemble
from training.catalog import COLUMNS, matrix
from training.configs import card, options
from training.launch import free_port
from training.parallel import STRATEGIES
from training.progress import Progress
from training.train import resume, start

TECHNIQUES = options("technique")
CARD = ("paper", "arxiv", "year", "slot", "mechanism", "claim", "source", "natural", "unsupported")


def supported(technique: str, column: str) -> None:
    """Skip what the card declares unsupported."""
    reason = card(technique)["unsupported"].get(column)
    if reason:
        pytest.skip(f"unsupported: {reason}")


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_compose(technique, tmp_path):
    config, _ = tiny(technique, tmp_path)
    about = config["techniques"][technique]
    assert [key for key in CARD if key not in about] == []
    assert set(about["unsupported"]) <= set(COLUMNS)
    assert "compose" not in about["unsupported"]
    assemble(config)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_steps(technique, tmp_path):
    supported(technique, "steps")
    _, changed = fitted(technique, tmp_path, "trainer.max_steps=2")
    assert changed


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_checkpoint(technique, tmp_path):
    supported(technique, "checkpoint")
    run, _ = fitted(technique, tmp_path, "trainer.max_steps=2", post=False)
    again = assemble(run.config)
    again.open(tmp_path)
    checkpoint.load(again, checkpoint.found(tmp_path)[0])
    assert again.step == 2
    _assert_equal(again.objective.state_dict(), run.objective.state_dict())
    _assert_equal(again.optimizer.state_dict(), run.optimizer.state_dict())
    for name, part in run.stateful().items():
        _assert_equal(again.stateful()[name].state_dict(), part.state_dict())


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_resume(technique, tmp_path):
    """A run cut back to its third step and resumed ends in the same bits."""
    supported(technique, "resume")
    extra = ("trainer.max_steps=6", "trainer.checkpoint_every=3", "trainer.keep_checkpoints=9")
    config, overrides = tiny(technique, tmp_path, "trainer.eval_every=4", *extra)
    whole = Path(start(config, overrides, Progress())["run_dir"])
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    (cut / "summary.json").unlink()
    torch.rand(7)  # the state a new process starts in is another
    resume(cut, [], Progress())
    final = Path("checkpoints") / "step-00000006" / "model.safetensors"
    assert (cut / final).read_bytes() == (whole / final).read_bytes()
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_bf16(technique, tmp_path):
    supported(technique, "bf16")
    _, changed = fitted(technique, tmp_path, "trainer.max_steps=2", "trainer.precision=bf16")
    assert changed


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_compile(technique, tmp_path):
    """Traced by Dynamo and AOTAutograd, without a code generator: losses as without it."""
    supported(technique, "compile")
    torch.compiler.reset()
    compiled = ("trainer.compile=true", "trainer.compile_backend=aot_eager")
    steps = "trainer.max_steps=2"
    run, changed = fitted(technique, tmp_path / "compiled", steps, *compiled)
    plain, _ = fitted(technique, tmp_path / "plain", steps)
    assert changed
    assert run.last["train/loss"] == pytest.approx(plain.last["train/loss"], rel=1e-3)


@pytest.fixture(scope="module")
def in_two_processes(request, tmp_path_factory):
    """What two processes say of every technique chosen, under a strategy, asked once by all
    workers."""
    parameters = [item.callspec.params for item in request.session.items if "[" in item.name]
    chosen = sorted({p["technique"] for p in parameters if {"technique", "strategy"} <= p.keys()})

    def ask(strategy):
        def train():
            return _all_in_two_processes(chosen, strategy, tmp_path_factory.mktemp(strategy))

        return _once(tmp_path_factory, strategy, train)

    return ask


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    """The losses of a technique in one process, trained once for both strategies."""

    def ask(technique, accumulate):
        def train():
            folder = tmp_path_factory.mktemp(technique)
            fitted(technique, folder, "trainer.max_steps=3", f"trainer.accumulate={accumulate}")
            return losses(folder)

        return _once(tmp_path_factory, f"{technique}-{accumulate}", train)

    return ask


def _once(tmp_path_factory, name, train):
    """What `train()` returns, which one of this session's workers calls for all."""
    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    shared = folder / f"{name}.json"
    with FileLock(shared.with_suffix(".lock")):
        if not shared.exists():
            shared.write_text(json.dumps(train()))
        return json.loads(shared.read_text())


def _all_in_two_processes(techniques, strategy, folder):
    """After a failure the processes start again with the techniques that are left."""
    results = {}
    path = folder / "results.json"
    left = [name for name in techniques if strategy not in card(name)["unsupported"]]
    while left:
        path.unlink(missing_ok=True)
        output = _two_processes([str(path), strategy, *left])
        found = json.loads(path.read_text()) if path.exists() else {left[0]: output[-2000:]}
        results |= found
        left = [name for name in left if name not in found]
    return results


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes(technique, strategy, in_two_processes, in_one_process):
    """Two processes have the losses of one, whose batch is whole or the same two micro-batches.

    What differs for a reason that the card gives is near them.
    """
    supported(technique, strategy)
    found = in_two_processes(strategy)[technique]
    assert isinstance(found, list), found
    tolerance = 0.02 if card(technique).get("across_processes") else 1e-5
    for accumulate in (2, 1):
        expected = in_one_process(technique, accumulate)
        if found == pytest.approx(expected, rel=tolerance):
            return
    assert found == pytest.approx(expected, rel=tolerance)


def test_recorded_matrix_is_current():
    recorded = matrix()
    assert sorted(recorded) == TECHNIQUES
    for name, row in recorded.items():
        reasons = card(name)["unsupported"]
        assert row == {column: reasons.get(column, "pass") for column in COLUMNS}, name


def _two_processes(arguments: list[str]) -> str:
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.conformance.processes", *arguments]
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        return "".join(process.communicate(timeout=500)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()


def _assert_equal(ours: object, theirs: object) -> None:
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor)
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert isinstance(ours, dict)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            _assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list | tuple)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs):
            _assert_equal(mine, other)
    else:
        assert ours == theirs
