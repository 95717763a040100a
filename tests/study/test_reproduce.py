import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from study import reproduce, worker
from study.pool import Pool
from study.recipe import read
from training.errors import UsageError

BASE = [
    *("task=digits", "model=mlp", "model.width=8", "trainer.max_steps=2", "tracker=none"),
    *("trainer.device=cpu", "trainer.eval_samples=32"),
]


def assay(*arguments, check=True, **keys):
    """The command's JSON."""
    command = [sys.executable, "-m", "cli", "reproduce", *map(str, arguments), "--jobs=1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **keys)
    assert not check or done.returncode == 0, done.stderr
    return done, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def touched(outputs):
    """Modification times of every run's metrics."""
    return {p: p.stat().st_mtime_ns for p in Path(outputs).glob("runs/*/metrics.jsonl")}


def test_a_verdict_and_nothing_twice(small, tmp_path):
    outputs = tmp_path / "outputs"
    _, result = assay(small, "--outputs", outputs)
    assert result["recipe"] == "small"
    first, second = result["claims"]
    assert (first["claim"], first["verdict"]) == ("fast < slow", "reproduced")
    assert first["interval"][0] > 0
    assert second["claim"] == "val/accuracy(fast) > val/accuracy(slow)"
    assert len(result["runs"]) == 6
    assert all(run["status"] == "completed" for run in result["runs"])
    before = touched(outputs)
    assert len(before) == 6

    _, again = assay(small, "--outputs", outputs)
    assert again["claims"] == result["claims"]
    assert touched(outputs) == before
    _, more = assay(small, "--outputs", outputs, "--seeds", 4)
    assert len(touched(outputs)) == 8
    assert [run["seed"] for run in more["runs"] if run["arm"] == "fast"] == [0, 1, 2, 3]


@pytest.mark.slow
def test_killed_and_run_again_trains_what_is_missing(small, tmp_path):
    outputs = tmp_path / "outputs"
    command = [sys.executable, "-m", "cli", "reproduce", str(small), "--outputs", str(outputs)]
    process = subprocess.Popen(
        [*command, "--jobs", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list(outputs.glob("runs/*/summary.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p.parent: p.stat().st_mtime_ns for p in outputs.glob("runs/*/summary.json")}
    assert 2 <= len(done) < 6
    _, result = assay(small, "--outputs", outputs)
    assert result["claims"][0]["verdict"] == "reproduced"
    runs = {Path(run["run_dir"]) for run in result["runs"]}
    assert len(runs) == 6 == len(list(outputs.glob("runs/*")))
    finished = [p for p in done if json.loads((p / "summary.json").read_text())]
    assert all((p / "summary.json").stat().st_mtime_ns == done[p] for p in finished[:2])


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(small, tmp_path):
    """In the middle of a run, which stops with a checkpoint and goes on from there."""
    small.write_text(small.read_text().replace("trainer.max_steps=60", "trainer.max_steps=1000"))
    outputs = tmp_path / "outputs"
    command = [sys.executable, "-m", "cli", "reproduce", str(small), "--outputs", str(outputs)]
    process = subprocess.Popen(
        [*command, "--jobs", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(outputs.glob("runs/*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    again = f"go on with: assay reproduce {small} --outputs {outputs} --jobs 1"
    assert again in " ".join((out + err).split())
    assert "Traceback" not in out + err
    (folder,) = outputs.glob("runs/*")
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    _, result = assay(small, "--outputs", outputs)
    assert {run["status"] for run in result["runs"]} == {"completed"}
    assert (folder / "log.txt").read_text().count("step 10/1000 ") == 1  # not from the start


@pytest.mark.slow
def test_a_failed_run_is_told_and_the_others_go_on(small, tmp_path):
    text = small.read_text().replace("fast: [optimizer.lr=3e-2]", "fast: [model.depth=-1]")
    small.write_text(text)
    done, result = assay(small, "--outputs", tmp_path / "outputs", check=False)
    assert done.returncode == 1
    assert "fast seed 0: failed: " in done.stderr
    assert "Traceback" not in done.stderr
    assert {r["status"] for r in result["runs"] if r["arm"] == "slow"} == {"completed"}
    claim = result["claims"][0]
    assert (claim["verdict"], claim["note"]) == ("inconclusive", "3 of 3 seeds have no value")


@pytest.mark.slow
def test_tuning_gives_every_arm_the_same_budget(small, tmp_path):
    small.write_text(
        small.read_text()
        .replace("slow: [optimizer.lr=1e-6]", "slow: [model.width=4]")
        .replace("fast: [optimizer.lr=3e-2]", "fast: []")
        + "tune: {grid: {optimizer.lr: [1e-6, 1e-2]}, seeds: [50]}\n"
    )
    _, result = assay(small, "--outputs", tmp_path / "outputs")
    assert result["chosen"] == {"slow": ["optimizer.lr=1e-2"], "fast": ["optimizer.lr=1e-2"]}
    assert len(result["tuning"]) == 4
    assert {row["seed"] for row in result["tuning"]} == {50}


@pytest.mark.slow
def test_a_stage_is_tuned_from_the_tuned_weights(small, tmp_path):
    """The stage's tuning runs start where the chosen point of the arm before has ended."""
    small.write_text(
        small.read_text()
        .replace("slow: [optimizer.lr=1e-6]", "slow: [model.width=4]")
        .replace("fast: [optimizer.lr=3e-2]", "fast: []\n  after: {from: fast, overrides: []}")
        + "tune: {grid: {optimizer.lr: [1e-9, 1e-2]}, seeds: [50]}\n"
    )
    _, result = assay(small, "--outputs", tmp_path / "outputs")
    assert set(map(tuple, result["chosen"].values())) == {("optimizer.lr=1e-2",)}
    tuned = {(r["arm"], *r["overrides"]): r for r in result["tuning"]}
    assert len(tuned) == 6
    still = next(r for k, r in tuned.items() if k[0] == "after" and "optimizer.lr=1e-9" in k)
    before = next(r for k, r in tuned.items() if k[0] == "fast" and "optimizer.lr=1e-2" in k)
    assert still["metrics"]["val/loss"] == pytest.approx(before["metrics"]["val/loss"], abs=1e-4)


@pytest.mark.slow
def test_a_stage_starts_from_the_other_arms_weights(small, tmp_path):
    text = small.read_text().replace(
        "fast: [optimizer.lr=3e-2]",
        "fast: [optimizer.lr=3e-2]\n  after: {from: fast, overrides: [optimizer.lr=1e-9]}",
    )
    small.write_text(text.replace("claims: [", "claims: [after < slow, "))
    _, result = assay(small, "--outputs", tmp_path / "outputs")
    losses = {(r["arm"], r["seed"]): r["metrics"]["val/loss"] for r in result["runs"]}
    for seed in range(3):
        assert losses["after", seed] == pytest.approx(losses["fast", seed], abs=1e-4)


def test_a_stage_starts_from_a_run_that_another_recipe_has_trained_meanwhile(small, tmp_path):
    text = small.read_text().replace("seeds: [0, 1, 2]", "seeds: [0, 1]")
    small.write_text(text.replace("slow: [optimizer.lr=1e-6]", "slow: {from: fast, overrides: []}"))
    outputs = str(tmp_path / "outputs")
    study = reproduce.plan(read(str(small)), (0, 1), outputs)
    first = next(trial for trial in study.trials if trial.arm == "fast" and trial.seed == 0)
    other = [o if not o.startswith("name=") else "name=other" for o in first.overrides]
    assert worker.answer({"overrides": other})["summary"]["status"] == "completed"
    reproduce.train(study, Pool(1), lambda *_: None)
    assert [trial.missing() for trial in study.trials] == [None] * 4
    assert len(list(Path(outputs).glob("runs/*-fast-*"))) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("val/accuracy(fast)", "val/acuracy(fast)", ":9: no metric 'val/acuracy'"),
        ("val/accuracy(fast)", "accuracy(fast)", ":9: no metric 'accuracy'; did you mean 'val/acc"),
        ("fast < slow", "fast < slwo", ":9: claim 'fast < slwo': no arm 'slwo'"),
    ],
)
def test_mistakes_are_found_before_training(small, tmp_path, old, new, message):
    small.write_text(small.read_text().replace(old, new))
    done, _ = assay(small, "--outputs", tmp_path / "outputs", check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_runs_that_all_diverged_are_judged_again(small, tmp_path):
    """The metric is that of a run even where it is no number."""
    text = small.read_text().replace("fast: [optimizer.lr=3e-2]", "fast: [optimizer.lr=1e30]")
    text = text.replace("slow: [optimizer.lr=1e-6]", "slow: [optimizer.lr=1e25]")
    small.write_text(
        text.replace("claims: [", "metric: train/loss\nclaims: [diverged(slow) < 2, ").replace(
            ", val/accuracy(fast) > val/accuracy(slow)", ""
        )
    )
    outputs = tmp_path / "outputs"
    _, first = assay(small, "--outputs", outputs)
    assert {run["status"] for run in first["runs"]} == {"diverged"}
    _, again = assay(small, "--outputs", outputs)
    assert again["claims"] == first["claims"]
    assert [claim["verdict"] for claim in again["claims"]] == ["reproduced", "inconclusive"]


def test_dry_run(small, tmp_path):
    _, result = assay(small, "--outputs", tmp_path / "outputs", "--dry-run")
    assert len(result["runs"]) == 6
    assert {row["state"] for row in result["runs"]} == {"would train"}
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_two_at_once_share_their_runs(small, tmp_path):
    outputs = tmp_path / "outputs"
    command = [sys.executable, "-m", "cli", "reproduce", str(small), "--outputs", str(outputs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    results = [json.loads(p.communicate()[0].splitlines()[-1]) for p in both]
    assert results[0]["claims"] == results[1]["claims"]
    assert len(list(outputs.glob("runs/*"))) == 6


def test_a_killed_worker_costs_one_run(tmp_path):
    tasks = [[*BASE, f"seed={s}", f"outputs={tmp_path}"] for s in range(2)]
    tasks.insert(1, [*BASE, "trainer.max_steps=100000", f"outputs={tmp_path}", "name=long"])
    answers = []
    with Pool(1) as pool:

        def done(number, answer):
            answers.append((number, answer))

        import threading

        def kill():
            while not list(tmp_path.glob("runs/long-*/metrics.jsonl")):
                time.sleep(0.05)
            process = pool._workers[0]._process
            assert process is not None
            process.kill()

        threading.Thread(target=kill, daemon=True).start()
        found = pool.run(tasks, done)
    assert found[0]["summary"]["status"] == found[2]["summary"]["status"] == "completed"
    assert found[1] == {"error": "its process was killed by SIGKILL, perhaps for want of memory"}


def test_conclude_of_several_claims_is_corrected(small, tmp_path):
    study = reproduce.plan(read(str(small)), (0, 1, 2), str(tmp_path))
    for trial in study.trials:
        value = (1.0 if trial.arm == "slow" else 0.5) + 0.1 * trial.seed**2 * (trial.arm == "fast")
        trial.answer = {
            "summary": {
                "status": "completed",
                "metrics": {"val/loss": value, "val/accuracy": -value},
                "seconds": 1.0,
                "parameters": 1,
                "step": 6,
            }
        }
    reproduce.conclude(study)
    alone = [claim["p"] for claim in reproduce.result(study)["claims"]]
    assert alone[0] == alone[1]
    study.recipe = read(str(small))
    object.__setattr__(study.recipe, "claims", study.recipe.claims[:1])
    reproduce.conclude(study)
    assert reproduce.result(study)["claims"][0]["p"] == pytest.approx(alone[0] / 2)


@pytest.mark.slow
def test_runs_of_two_processes(tmp_path):
    """A run of a study may be of several; the second time it is there, and a mistake is told."""
    overrides = [*BASE, "trainer.processes=2", f"outputs={tmp_path}"]
    with Pool(1) as pool:
        first, again = pool.train(overrides), pool.train(overrides)
        (wrong,) = pool.run([[*overrides, "trainer.batch_size=1"]], lambda number, answer: None)
    assert first["summary"]["status"] == "completed"
    assert again == first
    assert wrong is not None
    assert wrong["error"].startswith("trainer.batch_size: 1 samples cannot be split")
    folder = Path(first["summary"]["run_dir"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["processes"] == 2


def test_overrides_that_do_not_compose(small, tmp_path):
    small.write_text(small.read_text().replace("optimizer.lr=3e-2", "optimiser.lr=3e-2"))
    with pytest.raises(UsageError, match="optimiser"):
        reproduce.plan(read(str(small)), (0, 1), str(tmp_path))
