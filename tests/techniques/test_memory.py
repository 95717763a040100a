import json

import pytest
import torch

from techniques.distill.memory import Memory, recalled
from tests.cli.invoke import invoke
from training.assemble import assemble
from training.compose import compose
from training.progress import Progress
from training.tracking import NoTracker
from training.trainer import fit

FEW = "+data.transforms.few={_target_:tasks.transforms.subset,samples:10}"


class Witness:
    """Counts epochs by the place in the order of samples, and keeps all that the model says."""

    def __init__(self, epochs):
        self.epochs, self.said, self.checked = epochs, {}, 0

    def on_batch(self, run):
        place, said = run.step * 4, {}
        for batch in run.microbatches:
            with torch.no_grad():
                logits = run.objective.predict(batch)["logits"]
            assert batch["epochs"] == 4
            known = batch[f"known_{self.epochs}_ago"]
            for i, sample in enumerate(batch["index"].tolist()):
                epoch = place // 10
                assert batch["epoch"][i] == epoch
                assert known[i] == ((sample, epoch - self.epochs) in self.said)
                if known[i]:
                    past = batch[f"logits_{self.epochs}_ago"][i]
                    torch.testing.assert_close(past, self.said[sample, epoch - self.epochs])
                    self.checked += 1
                said[sample, epoch] = logits[i]
                place += 1
        self.said |= said


def run_with(tmp_path, epochs, *overrides):
    config = compose(
        [
            *("task=digits", "technique=saf", FEW, "tracker=none", "trainer.device=cpu"),
            *("model.width=8", "trainer.batch_size=4", "trainer.max_steps=9"),
            *(f"penalties.saf.epochs={epochs}", f"penalties.saf.start={epochs}"),
            *("trainer.eval_samples=8", f"outputs={tmp_path}", *overrides),
        ]
    )
    run = assemble(config)
    run.open(tmp_path)
    run.callbacks["witness"] = Witness(epochs)
    assert fit(run, NoTracker(), Progress()) == "completed"
    return run


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_recalls_what_the_model_said_so_many_epochs_ago(tmp_path, epochs, accumulate):
    """Ten samples in batches of four: an epoch ends within a batch."""
    run = run_with(tmp_path, epochs, f"trainer.accumulate={accumulate}")
    assert run.callbacks["witness"].checked >= 25 - 10 * (epochs - 1)
    assert run.callbacks["saf"].logits.shape == (10, epochs, 10)


def test_a_second_pass_of_a_step_is_not_remembered(tmp_path):
    """SAM's, at other weights: the witness has seen the first."""
    assert run_with(tmp_path, 1, "technique=[saf,sam]").callbacks["witness"].checked >= 25


def test_two_memories_in_one_run(tmp_path):
    run = run_with(tmp_path, 2, "technique=[saf,ps_kd]")
    one, two = run.callbacks["ps_kd"], run.callbacks["saf"]
    last = two.when.argmax(1)
    assert one.when[:, 0].equal(two.when[torch.arange(10), last])
    assert one.logits[:, 0].equal(two.logits[torch.arange(10), last])


def test_of_a_sample_twice_in_a_step_the_last_counts():
    """Here sample 2, at the end of epoch 4 and the start of epoch 5."""
    logits, epoch = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([4, 4, 5])
    memory = Memory(1)
    memory.remember(3, torch.tensor([2, 0, 2]), epoch, logits)
    assert memory.logits[:, 0, 0].tolist() == [2.0, 0.0, 3.0]
    assert memory.when[:, 0].tolist() == [4, -2, 5]
    memory = Memory(2)
    memory.remember(3, torch.tensor([2, 0, 2]), epoch, logits)
    assert memory.logits[:, :, 0].tolist() == [[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]]


@pytest.mark.parametrize("technique", ["ps_kd", "saf"])
def test_refuses_a_language_model_in_one_line(tmp_path, technique):
    tiny = ("model.width=16", "model.depth=1", "model.heads=2", "task.context_length=16")
    result = invoke("run", f"technique={technique}", *tiny, "tracker=none", f"outputs={tmp_path}")
    assert result.code == 2
    assert "logits are remembered of classification alone" in result.err.splitlines()[-1]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="epochs: must be at least 1"):
        Memory(0)
    with pytest.raises(ValueError, match=r"needs a callback .*Memory, epochs=3"):
        recalled({"logits_1_ago": torch.zeros(1)}, 3)
    memory = "+callbacks.m={_target_:techniques.distill.memory.Memory}"
    result = invoke("run", "task=digits", memory, "tracker=none", f"outputs={tmp_path}", "--json")
    assert result.code == 2, json.dumps(result.err)
    assert "no loss or penalty that notes them" in result.err
