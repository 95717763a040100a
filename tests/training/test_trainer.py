import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from tests.cli.invoke import invoke
from training.assemble import assemble
from training.catalog import ROOT
from training.compose import compose
from training.evaluate import evaluate
from training.progress import Progress
from training.tracking import NoTracker
from training.trainer import fit

TINY = [
    *("task=digits", "model=mlp", "tracker=none", "trainer.batch_size=16", "trainer.device=cpu"),
    *("trainer.max_steps=8", "trainer.log_every=1", "trainer.eval_every=4"),
    "trainer.checkpoint_every=4",
]


def trained(tmp_path, *overrides):
    run = assemble(compose([*TINY, *overrides]))
    tmp_path.mkdir(exist_ok=True)
    run.open(tmp_path)
    status = fit(run, NoTracker(), Progress())
    run.metrics.close()
    return run, status


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_equals_a_plain_loop(tmp_path):
    """Weights after eight steps are those of a loop written out by hand."""
    sgd = ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0", "schedule=linear"]
    overrides = [*sgd, "optimizer.weight_decay=0", "schedule.warmup=0", "trainer.clip_norm=0.5"]
    run, status = trained(tmp_path, *overrides)
    assert status == "completed"
    again = assemble(run.config)
    optimizer = torch.optim.SGD(again.model.parameters())
    for step in range(8):
        (batch,) = again.batches[step]
        logits = again.model(pixel_values=batch["pixel_values"])["logits"]
        nn.functional.cross_entropy(logits, batch["labels"]).backward()
        nn.utils.clip_grad_norm_(again.model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 8)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(run.model), weights(again.model))


def test_accumulation_equals_one_batch(tmp_path):
    whole, _ = trained(tmp_path / "a")
    parts, _ = trained(tmp_path / "b", "trainer.accumulate=3")
    torch.testing.assert_close(weights(whole.model), weights(parts.model), rtol=1e-4, atol=1e-5)


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    overrides = ["optimizer=sgd", "optimizer.lr=1e-3", "trainer.clip_norm=null"]
    config = compose([*TINY, *overrides])
    run = assemble(config)
    run.open(tmp_path)

    class Explode:
        def on_step_end(self, run):
            if run.step == 6:
                with torch.no_grad():
                    next(run.model.parameters()).fill_(float("nan"))

    run.callbacks["explode"] = Explode()
    assert fit(run, NoTracker(), Progress()) == "diverged"
    assert "step 7" in run.stopped
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000004"]


def test_diverged_run_exits_with_1(tmp_path):
    arguments = ["optimizer=sgd", "optimizer.lr=1e18", "trainer.clip_norm=null"]
    result = invoke("run", *TINY, *arguments, f"outputs={tmp_path}", "--json")
    assert result.code == 1, result.err
    assert json.loads(result.out.splitlines()[-1])["status"] == "diverged"


def test_time_budget(tmp_path):
    run, status = trained(tmp_path, "trainer.max_steps=100000", "trainer.max_minutes=0.02")
    assert status == "completed"
    assert "minutes" in run.stopped
    assert 0 < run.step < 100_000
    assert (tmp_path / "checkpoints" / f"step-{run.step:08d}").is_dir()


def test_a_callback_can_stop_the_run(tmp_path):
    run = assemble(compose(TINY))
    run.open(tmp_path)

    class Enough:
        def on_step_end(self, run):
            if run.step == 3:
                run.stop("enough")

    run.callbacks["enough"] = Enough()
    assert fit(run, NoTracker(), Progress()) == "completed"
    assert (run.step, run.stopped) == (3, "enough")


def test_evaluation_leaves_training_as_it_was(tmp_path):
    rare, _ = trained(tmp_path / "rare", "trainer.eval_every=8")
    often, _ = trained(tmp_path / "often", "trainer.eval_every=1")
    assert weights(rare.model).equal(weights(often.model))


def test_evaluation_is_an_exact_mean_over_the_validation_set(tmp_path):
    run, _ = trained(tmp_path, "trainer.eval_samples=null", "trainer.eval_batch_size=7")
    from tasks.fetch import fetch

    rows = fetch(run.task.validation, torch.arange(len(run.task.validation)))
    batch = run.task.prepare(rows, torch.Generator(), False)
    with torch.no_grad():
        logits = run.model.eval()(pixel_values=batch["pixel_values"])["logits"]
    expected = nn.functional.cross_entropy(logits.double(), batch["labels"]).item()
    assert run.last["val/loss"] == pytest.approx(expected, rel=1e-6)
    accuracy = (logits.argmax(-1) == batch["labels"]).double().mean().item()
    assert run.last["val/accuracy"] == pytest.approx(accuracy, rel=1e-12)


def test_what_a_task_collects_reaches_its_summary_whole_and_in_order(tmp_path):
    run, _ = trained(tmp_path, "trainer.eval_samples=null", "trainer.eval_batch_size=7")
    wanted = torch.tensor(run.task.validation["labels"])

    def collect(outputs, batch):
        return {"predicted": outputs["logits"].argmax(-1), "labels": batch["labels"]}

    def summarise(rows):
        assert rows["labels"].equal(wanted)
        return {"right": (rows["predicted"] == rows["labels"]).double().mean().item()}

    run.task.collect, run.task.summarise = collect, summarise
    values = evaluate(run)
    assert values["val/right"] == pytest.approx(values["val/accuracy"], rel=1e-12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_writes_a_checkpoint_and_says_how_to_go_on(number, tmp_path):
    command = [sys.executable, "-m", "cli", "run", *TINY, "trainer.max_steps=1000000", "--quiet"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not any(
        path.stat().st_size for path in tmp_path.glob("outputs/runs/*/metrics.jsonl")
    ):
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert f"go on with: assay run --resume outputs/runs/{folder.name}" in out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert (folder / "checkpoints" / f"step-{summary['step']:08d}").is_dir()
    assert "Traceback" not in err


def test_two_processes_train_as_one(tmp_path):
    """The same global batches: weights as from one process, to rounding."""
    arguments = [*TINY, "--json", "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    results = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "cli", "run", f"trainer.processes={processes}", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1])["metrics"])
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-4)
