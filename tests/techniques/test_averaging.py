import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from techniques.callback.averaging import EMA, SWA, Averaging
from techniques.post.averaged import Averaged
from training import checkpoint
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.metrics import read
from training.progress import Progress
from training.tracking import NoTracker
from training.train import resume, start
from training.trainer import fit

SMALL = [
    *("task=digits", "model=mlp", "model.width=16", "model.depth=1", "tracker=none"),
    *("trainer.device=cpu", "trainer.max_steps=6", "trainer.eval_every=2", "trainer.log_every=1"),
    *("trainer.checkpoint_every=3", "trainer.keep_checkpoints=9", "trainer.eval_samples=64"),
]
WITH = "+callbacks.ema={_target_:techniques.callback.averaging.EMA,decay:0.5"


def walk(callback: Averaging, steps: int = 20) -> tuple[np.ndarray, nn.Module]:
    """A layer's weights at every step of a random walk that a callback follows, in float64."""
    layer = nn.Linear(3, 2, bias=False).double()
    run = SimpleNamespace(objective=layer, step=0, max_steps=steps)
    callback.on_fit_start(run)
    generator, seen = torch.Generator().manual_seed(0), []
    for run.step in range(1, steps + 1):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3, generator=generator, dtype=torch.float64))
        seen.append(layer.weight.detach().numpy().copy())
        callback.on_step_end(run)
    return np.stack(seen), layer


def trained(tmp_path, *overrides):
    run = assemble(compose([*SMALL, *overrides, f"outputs={tmp_path}"]))
    tmp_path.mkdir(exist_ok=True)
    run.open(tmp_path)
    assert fit(run, NoTracker(), Progress()) == "completed"
    return run


def curve(folder, name):
    return {r["step"]: r[name] for r in read(folder / "metrics.jsonl") if name in r}


def test_ema_is_pandas():
    callback = EMA(decay=0.9)
    seen, _ = walk(callback)
    expected = pd.DataFrame(seen.reshape(20, 6)).ewm(alpha=0.1, adjust=False).mean().to_numpy()[-1]
    found = callback.average.tensors["weight"].numpy().reshape(6)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_ema_is_torchs_averaged_model():
    callback = EMA(decay=0.7)
    layer = nn.Linear(3, 2)
    peer = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    run = SimpleNamespace(objective=layer, step=0, max_steps=5)
    callback.on_fit_start(run)
    for run.step in range(1, 6):
        nn.init.normal_(layer.weight)
        peer.update_parameters(layer)
        callback.on_step_end(run)
    assert callback.average.tensors["weight"].equal(peer.module.weight)


def test_swa_is_the_mean_of_every_fourth_step_after_the_first_half():
    callback = SWA(start=0.5, every=4)
    seen, _ = walk(callback)
    expected = seen[[11, 15, 19]].mean(0)  # after steps 12, 16 and 20
    np.testing.assert_allclose(callback.average.tensors["weight"].numpy(), expected, rtol=1e-12)


def test_frozen_parameters_are_left_out():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    callback = EMA()
    callback.on_fit_start(SimpleNamespace(objective=layer))
    assert list(callback.average.tensors) == ["weight"]


def test_training_is_the_same_and_evaluation_is_not(tmp_path):
    plain = trained(tmp_path / "plain")
    averaged = trained(tmp_path / "averaged", WITH + "}")
    for name in ("train/loss", "grad_norm"):
        assert curve(plain.folder, name) == curve(averaged.folder, name)
    values = curve(plain.folder, "val/loss"), curve(averaged.folder, "val/loss")
    assert all(values[0][step] != values[1][step] for step in (2, 4, 6))
    for name, parameter in plain.model.named_parameters():
        assert parameter.equal(averaged.model.get_parameter(name))


def test_until_it_begins_the_weights_are_evaluated(tmp_path):
    plain = trained(tmp_path / "plain")
    late = trained(tmp_path / "late", WITH + ",start:0.5}")
    values = curve(plain.folder, "val/loss"), curve(late.folder, "val/loss")
    assert values[0][2] == values[1][2]
    assert values[0][6] != values[1][6]


def test_final_leaves_the_average_in_the_last_checkpoint(tmp_path):
    run = trained(tmp_path, WITH + ",final:true}")
    for number, same in ((3, False), (6, True)):
        model = assemble(run.config).model
        folder = tmp_path / "checkpoints" / f"step-{number:08d}"
        checkpoint.load_model_of(folder, model)
        assert model.layers[0].weight.equal(run.model.layers[0].weight) is same
    average = run.callbacks["ema"].average.tensors
    assert all(p.equal(average[n]) for n, p in run.objective.named_parameters())


def test_post_step_leaves_it_too(tmp_path):
    run = trained(tmp_path, WITH + "}", "+post.ema={_target_:techniques.post.averaged.Averaged}")
    assert run.last["post/ema/val/loss"] == run.last["val/loss"]
    average = run.callbacks["ema"].average.tensors
    assert all(p.equal(average[n]) for n, p in run.objective.named_parameters())


def test_resumes_to_the_bit(tmp_path):
    overrides = [*SMALL, WITH + ",final:true}", f"outputs={tmp_path}"]
    whole = Path(start(compose(overrides), overrides, Progress())["run_dir"])
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    (cut / "summary.json").unlink()
    resume(cut, [], Progress())
    final = Path("checkpoints") / "step-00000006" / "model.safetensors"
    assert (cut / final).read_bytes() == (whole / final).read_bytes()
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_refusals():
    with pytest.raises(ValueError, match="decay: must be in"):
        EMA(decay=1.0)
    with pytest.raises(ValueError, match="start: must be in"):
        SWA(start=1.0)
    with pytest.raises(ValueError, match="every: must be at least 1, got 0"):
        SWA(every=0)
    run = SimpleNamespace(callbacks={"ema": EMA()})
    with pytest.raises(UsageError, match="no callback 'emma' with an average; did you mean 'ema'"):
        Averaged("emma")(run)
    with pytest.raises(UsageError, match=r"callbacks\.ema has averaged nothing"):
        Averaged()(run)
