"""The commands, on real runs."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from scipy import stats

from tests.cli.invoke import invoke
from training.catalog import ROOT
from training.configs import options
from training.libraries import library

TINY = (
    *("task=digits", "model=mlp", "tracker=none", "trainer.max_steps=4", "trainer.eval_every=2"),
    *("trainer.checkpoint_every=2", "trainer.log_every=1", "trainer.batch_size=16"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their seed."""
    outputs = tmp_path_factory.mktemp("outputs")
    found = []
    for seed in (0, 1):
        result = invoke("run", *TINY, f"seed={seed}", f"outputs={outputs}", "--json")
        assert result.code == 0, result.err
        found.append(json.loads(result.out.splitlines()[-1]))
    return found


def test_json_of_a_run(runs):
    assert set(runs[0]) == {"run_dir", "status", "metrics"}
    assert runs[0]["status"] == "completed"
    assert {"val/loss", "val/accuracy", "train/loss"} <= runs[0]["metrics"].keys()


def test_same_configuration_again_trains_anew_to_the_same_numbers(runs, tmp_path):
    first = invoke("run", *TINY, f"outputs={tmp_path}", "--json")
    second = invoke("run", *TINY, f"outputs={tmp_path}", "--json")
    results = [json.loads(r.out.splitlines()[-1]) for r in (first, second)]
    assert results[1]["run_dir"] == results[0]["run_dir"] + "-2"
    assert results[0]["metrics"] == results[1]["metrics"] == runs[0]["metrics"]


def test_folder_of_a_run(runs, tmp_path):
    from pathlib import Path

    folder = Path(runs[0]["run_dir"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val/loss" in line] == [2, 4]
    assert yaml.safe_load((folder / "overrides.yaml").read_text())[: len(TINY)] == list(TINY)
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == 4
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"]
    assert "step 4/4" in (folder / "log.txt").read_text()
    png = (folder / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 600
    assert height > 300


def test_resume_of_a_complete_run_changes_nothing(runs):
    result = invoke("run", "--resume", runs[0]["run_dir"])
    assert result.code == 0
    assert "complete already" in result.out


def test_resume_with_more_steps(tmp_path):
    run = json.loads(invoke("run", *TINY, f"outputs={tmp_path}", "--json").out)
    result = invoke("run", "--resume", run["run_dir"], "trainer.max_steps=6", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out.splitlines()[-1])["run_dir"] == run["run_dir"]
    log = (tmp_path / "runs" / run["run_dir"].split("/")[-1] / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [1, 2, 3, 4, 5, 6]


def test_dry_run(tmp_path):
    result = invoke("run", *TINY, f"outputs={tmp_path}", "technique=golu", "--dry-run")
    assert result.code == 0, result.err
    assert "techniques.activation.golu.GoLU" in result.out
    assert "parameters" in result.out
    assert "2502.03654" in result.out
    assert not list(tmp_path.iterdir())


def test_dry_run_json(tmp_path):
    result = invoke("run", *TINY, "technique=golu", "--dry-run", "--json")
    found = json.loads(result.out.splitlines()[-1])
    assert found["parameters"][0]["parameters"] > 0
    assert "golu" in found["techniques"]
    assert found["config"]["trainer"]["max_steps"] == 4


def test_compare(runs, tmp_path):
    folders = [run["run_dir"] for run in runs]
    plot = tmp_path / "deep" / "plot.png"
    result = invoke("compare", *folders, "--plot", str(plot), "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1])
    assert found["differences"] == {}
    values = [run["metrics"]["val/loss"] for run in found["runs"]]
    assert values == [run["metrics"]["val/loss"] for run in runs]
    (group,) = found["groups"]
    assert group["seeds"] == [0, 1]
    interval = group["metrics"]["val/loss"]["interval"]
    assert interval == pytest.approx(stats.t.interval(0.95, 1, np.mean(values), stats.sem(values)))
    assert plot.read_bytes()[:4] == b"\x89PNG"
    shown = invoke("compare", *folders, "--plot", str(plot), "--metric", "accuracy")
    assert "val/accuracy" in shown.out
    assert invoke("compare", *folders, "--metric", "acuracy").code == 2


def test_export(runs, tmp_path):
    to = tmp_path / "model"
    result = invoke("export", runs[0]["run_dir"], "--to", str(to), "--checkpoint", "last")
    assert result.code == 0, result.err
    exported = load_file(to / "model.safetensors")
    from pathlib import Path

    last = Path(runs[0]["run_dir"]) / "checkpoints" / "step-00000004" / "model.safetensors"
    assert exported.keys() == load_file(last).keys()
    assert all(value.equal(load_file(last)[name]) for name, value in exported.items())
    refused = invoke("export", runs[0]["run_dir"], "--format", "huggingface")
    assert refused.code == 2
    assert "mlp" in refused.err


def test_list():
    result = invoke("list", "--json")
    rows = json.loads(result.out.splitlines()[-1])
    assert [row["name"] for row in rows] == options("technique")
    keys = {"name", "slot", "paper", "arxiv", "status", "verdict"}
    assert all(set(row) == keys for row in rows)
    assert {row["status"] for row in rows} <= {"verified", "unverified"}


@pytest.mark.parametrize("kind", ["tasks", "models", "optimizers", "schedules"])
def test_list_of_configs(kind):
    rows = json.loads(invoke("list", kind, "--json").out)
    known = options(kind.removesuffix("s"))
    if kind == "optimizers":  # and those of libraries
        known += library()
    assert [row["name"] for row in rows] == known
    assert all(row["target"] and row["about"] for row in rows), rows


def test_show():
    found = json.loads(invoke("show", "golu", "--json").out)
    assert found["arxiv"] == "2502.03654"
    assert found["code"] == {"techniques.activation.golu.GoLU": "techniques/activation/golu.py"}
    assert "Gompertz" in invoke("show", "golu").out
    assert "models.gpt.GPT" in invoke("show", "gpt").out


def test_matrix():
    result = invoke("list", "techniques", "--matrix")
    assert result.code == 0
    assert "golu" in result.out
    assert set(json.loads(invoke("list", "--matrix", "--json").out)) == set(options("technique"))


def test_doctor(monkeypatch, tmp_path):
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path))
    (tmp_path / "some_set").mkdir()
    found = json.loads(invoke("doctor", "--json").out)
    assert found["versions"]["torch"]
    assert found["data"]["found"] == "some_set"
    assert found["wandb"]["mode"] in ("online", "offline", "disabled")
    assert invoke("doctor").code == 0


def test_completion():
    from cli.complete import overrides, technique

    assert "technique=golu" in overrides("technique=go")
    assert "technique=[golu,golu" in overrides("technique=[golu,go")
    assert "trainer.max_steps=" in overrides("trainer.max_")
    assert "model=gpt" in overrides("model=")
    assert "golu" in technique("g")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("assay run technique=gol", "technique=golu"),  # zsh, fish
        ("assay run technique = gol", "golu"),  # bash: = is a word
        ("assay run model =", "gpt"),
        ("assay run trainer.max_s", "trainer.max_steps="),
        ("assay show gol", "golu"),
    ],
)
def test_completion_as_a_shell_asks(words, expected):
    environment = os.environ | {
        **{"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))},
        "_ASSAY_COMPLETE": "complete_bash",
    }
    command = [sys.executable, "-m", "cli"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert expected in done.stdout.split("\n"), done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["technique=grades"], "callbacks.grades: the model has no blocks"),
        (["technique=loss_free_balancing", "model=gpt"], None),
        (["technique=vat", "task=code", "model=gpt"], "vat"),
    ],
)
def test_parts_that_do_not_fit_are_a_mistake(overrides, message, tmp_path):
    tiny = [o for o in TINY if not any(o.split("=")[0] == x.split("=")[0] for x in overrides)]
    if message is None:
        tiny = [o for o in tiny if o != "task=digits"]
    result = invoke("run", *tiny, *overrides, f"outputs={tmp_path}", "--quiet")
    assert result.code == (2 if message else 0), result.err
    assert message is None or (message in result.err and result.err.count("\n") == 1)
