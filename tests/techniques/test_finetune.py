import json

import pytest
import torch
from safetensors.torch import load_file

from techniques.post.finetune import Finetune
from techniques.post.prune import Prune
from tests.cli.invoke import invoke
from tests.techniques.compressed import lines, run_of
from training.packing import load

PRUNE = "+post.prune={_target_:techniques.post.prune.Prune,amount:0.8}"
FINETUNE = "+post.finetune={_target_:techniques.post.finetune.Finetune,steps:20}"
QUANTISE = "+post.quantise={_target_:techniques.post.quantise.Quantise,bits:4}"


def finetuned(*overrides, steps=3, lr=0.05, prune=0.5):
    run = run_of("trainer.clip_norm=null", *overrides)
    Prune(prune)(run)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    Finetune(steps, lr)(run)
    return run, before


def test_is_gradient_descent_on_what_is_left():
    """Against plain steps w ← w − lr·(gradient where w ≠ 0) on the run's next batches."""
    plain = ("optimizer=sgd", "optimizer.momentum=0", "optimizer.weight_decay=0")
    run, before = finetuned(*plain, "schedule=constant", "schedule.warmup=0")
    model = run_of().model
    model.load_state_dict(before, strict=False)
    for step in range(3):
        batch = run.batches[step][0]
        logits = model(pixel_values=batch["pixel_values"])["logits"]
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(model.named_parameters(), gradients):
                keep = before[name] != 0 if p.ndim > 1 else torch.ones_like(p, dtype=torch.bool)
                p -= 0.05 * gradient * keep
    for name, p in model.named_parameters():
        torch.testing.assert_close(run.model.get_parameter(name), p, rtol=1e-5, atol=1e-7)
    assert run.step == 3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion_k"])
def test_pruned_weights_stay_zero_and_the_others_move(optimizer):
    run, before = finetuned(f"optimizer={optimizer}", lr=0.01)
    for name, p in run.model.named_parameters():
        if p.ndim > 1:
            assert not p[before[name] == 0].any()
            assert (p != before[name])[before[name] != 0].float().mean() > 0.8


def test_the_runs_own_optimizer_is_left_alone():
    run, _ = finetuned()
    assert not run.optimizer.state
    assert run.window == {}


def chain(tmp_path, *overrides):
    return lines(tmp_path, *overrides, PRUNE, FINETUNE, QUANTISE)


def test_a_chain_from_a_finished_run(tmp_path):
    start, trained = lines(tmp_path)
    begin = (f"trainer.start_from={start}", "trainer.max_steps=0")
    folder, metrics = chain(tmp_path, *begin)
    assert metrics["val/loss"] == trained["val/loss"]
    steps = ("prune", "finetune", "quantise")
    for step in steps:
        packed = folder / "post" / f"{step}.packed.safetensors"
        assert metrics[f"post/{step}/bytes"] == packed.stat().st_size
        plain = load_file(folder / "post" / f"{step}.safetensors")
        assert all(load(packed)[name].equal(value) for name, value in plain.items())
    bytes_ = [metrics["post/bytes"], *(metrics[f"post/{step}/bytes"] for step in steps)]
    assert bytes_[1] < 0.5 * bytes_[0]
    assert bytes_[2] == pytest.approx(bytes_[1], rel=0.02)
    assert bytes_[3] < 0.75 * bytes_[2]
    losses = [metrics[f"post/{step}/val/loss"] for step in steps]
    assert losses[1] < losses[0]
    assert losses[2] != losses[1]
    weights = [load_file(folder / "post" / f"{step}.safetensors") for step in steps]
    for name, value in weights[0].items():
        if value.ndim > 1:
            assert not weights[2][name][value == 0].any()
    _, again = chain(tmp_path / "again", *begin)
    assert again == metrics


def test_resumed_after_the_end_it_is_done_anew(tmp_path):
    folder, metrics = lines(tmp_path, PRUNE, FINETUNE)
    first = (folder / "metrics.jsonl").read_text()
    result = invoke("run", "--resume", str(folder), QUANTISE, "--json")
    assert result.code == 0, result.err
    found = (folder / "metrics.jsonl").read_text()
    assert found.startswith(first)
    last = json.loads(found.splitlines()[-1])
    assert "post/quantise/bytes" in last
    assert len(found.splitlines()) == len(first.splitlines()) + 1
    assert last["step"] == 12 + 20
    assert (
        metrics["post/finetune/val/loss"]
        == json.loads(result.out.splitlines()[-1])["metrics"]["post/finetune/val/loss"]
    )


def test_refuses_no_steps_and_no_rate():
    with pytest.raises(ValueError, match="steps: must be at least 1"):
        Finetune(0)
    with pytest.raises(ValueError, match="lr: must be above 0"):
        Finetune(1, 0.0)
