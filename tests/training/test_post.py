"""Steps after training, and runs that only have these."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.invoke import invoke

TINY = [
    *("task=digits", "model=mlp", "model.width=8", "tracker=none", "trainer.batch_size=16"),
    *("trainer.max_steps=4", "schedule.warmup=0", "trainer.device=cpu"),
]


class Scale:
    """Multiplies every parameter, as a post step."""

    def __init__(self, by: float) -> None:
        self.by = by

    @torch.no_grad()
    def __call__(self, run) -> None:
        for parameter in run.model.parameters():
            parameter.mul_(self.by)
        run.record({"post/scaled": self.by})


def run_of(tmp_path, *overrides):
    result = invoke("run", *TINY, *overrides, f"outputs={tmp_path}", "--json")
    assert result.code == 0, result.err
    return json.loads(result.out.splitlines()[-1])


@pytest.fixture
def start(tmp_path):
    return run_of(tmp_path)


def twice(name):
    return f"+post.{name}={{_target_:tests.training.test_post.Scale,by:2.0}}"


def test_steps_chain_and_start_from_a_finished_run(start, tmp_path):
    begin = (f"trainer.start_from={start['run_dir']}", "trainer.max_steps=0")
    found = run_of(tmp_path, *begin, twice("first"), twice("second"))
    assert found["status"] == "completed"
    assert found["metrics"]["val/loss"] == start["metrics"]["val/loss"]
    folder = tmp_path / "runs" / found["run_dir"].rpartition("/")[2]
    names = ("checkpoints/step-00000000/model", "post/first", "post/second")
    base, first, second = (load_file(folder / f"{name}.safetensors") for name in names)
    for name, value in base.items():
        assert first[name].equal(2 * value)
        assert second[name].equal(4 * value)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 0]
    assert {"post/first/val/loss", "post/first/val/accuracy"} <= lines[1].keys()
    assert "post/second/val/loss" in lines[2]
    assert lines[2]["post/scaled"] == 2
    longer = run_of(tmp_path, f"trainer.start_from={folder}")
    assert longer["status"] == "completed"


def test_no_steps_need_a_start(tmp_path):
    result = invoke("run", *TINY, "trainer.max_steps=0", f"outputs={tmp_path}")
    assert result.code == 2
    assert "max_steps: must be at least 1, or 0 with trainer.start_from" in result.err
