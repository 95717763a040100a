import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from tasks.cache import root
from techniques.distill.teacher import Teacher
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.progress import Progress
from training.tracking import NoTracker
from training.train import start
from training.trainer import Step, fit

TINY = [
    *("task=digits", "model=mlp", "model.width=16", "tracker=none", "trainer.batch_size=16"),
    *("trainer.device=cpu", "trainer.max_steps=2", "trainer.eval_samples=8", "schedule.warmup=0"),
]
MLP = (
    "{_target_:models.mlp.MLP,width:8,depth:1,activation:{_target_:torch.nn.ReLU},"
    "norm:{_target_:torch.nn.BatchNorm1d},head:{_target_:torch.nn.Linear}}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run with another width, depth and an adapter."""
    overrides = [
        *(*TINY, "model.width=8", "model.depth=1", "seed=3", "name=teacher"),
        *("+reparam.lora={_target_:techniques.reparam.adapters.lora,rank:2}",),
        f"outputs={tmp_path_factory.mktemp('outputs')}",
    ]
    return Path(start(compose(overrides), overrides, Progress())["run_dir"])


def student(tmp_path, *overrides, base=TINY, of=None, model=None, **keys):
    """A run of which the teacher, if any, has been loaded."""
    run = assemble(compose([*base, *overrides]))
    run.open(tmp_path)
    if of or model:
        given = {} if of is None else {"of": str(of)}
        run.callbacks["teacher"] = teacher = Teacher(model=model, **given, **keys)
        run.config["callbacks"]["teacher"] = {"model": repr(model)}
        teacher.on_fit_start(run)
    return run


def seen(run, batches):
    """The teacher's logits that the loss finds, micro-batch by micro-batch."""
    found = []

    def loss(outputs, batch):
        found.append(batch.get("teacher_logits"))
        assert found[-1] is None or found[-1].shape == outputs["logits"].shape
        return outputs["logits"].logsumexp(-1)

    run.objective.loss = loss
    Step(run)(batches)
    return found


def direct(folder, batch):
    """What the folder's model says, rebuilt and loaded by other means."""
    model = assemble(yaml.safe_load((folder / "config.yaml").read_text())).model
    load_model(model, str(max((folder / "checkpoints").glob("step-*")) / "model.safetensors"))
    with torch.no_grad():
        return model.eval()(pixel_values=batch["pixel_values"])["logits"]


def test_a_runs_folder_or_checkpoint_teaches_every_microbatch(folder, tmp_path):
    for of in (folder, max((folder / "checkpoints").glob("step-*"))):
        run = student(tmp_path, "trainer.accumulate=3", of=of)
        batches = run.batches[0]
        found = seen(run, batches)
        assert len(found) == 3
        for batch, logits in zip(batches, found):
            assert not logits.requires_grad
            torch.testing.assert_close(logits, direct(folder, batch))
            assert "teacher_logits" not in batch


def test_the_teacher_is_constant_and_in_no_checkpoint(folder, tmp_path):
    run = student(tmp_path, of=folder)
    teacher = run.callbacks["teacher"]
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    plain = student(tmp_path)
    assert run.objective.state_dict().keys() == plain.objective.state_dict().keys()
    assert set(run.stateful()) == set(plain.stateful())
    fit(run, NoTracker(), Progress())
    assert not teacher.model.training
    for name, value in teacher.model.state_dict().items():
        assert value.equal(before[name])
    assert all(p.grad is None for p in teacher.model.parameters())


def test_it_leaves_the_runs_random_state_and_settings_alone(folder, tmp_path):
    run = student(tmp_path)
    state = torch.get_rng_state()
    Teacher(of=str(folder)).on_fit_start(run)
    assert torch.get_rng_state().equal(state)


def test_a_component_is_drawn_from_the_seed_and_runs_under_autocast(tmp_path):
    overlay = ["technique=nkd_uskd", f"callbacks.teacher.model={MLP}", "trainer.precision=bf16"]
    found = []
    for seed in (0, 0, 1):
        run = assemble(compose([*TINY, *overlay, f"seed={seed}"]))
        run.open(tmp_path)
        run.callbacks["teacher"].on_fit_start(run)
        batch = assemble(compose([*TINY, "seed=0"])).batches[0]
        found.append(seen(run, batch)[0])
    assert found[0].dtype == torch.bfloat16
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])


def test_evaluation_has_no_teacher_and_needs_none(folder, tmp_path):
    overlay = ["technique=nkd_uskd", f"callbacks.teacher.of={folder}"]
    run = assemble(compose([*TINY, *overlay]))
    run.open(tmp_path)
    assert fit(run, NoTracker(), Progress()) == "completed"
    assert np.isfinite(run.last["val/loss"])


def test_a_local_model_of_transformers(tmp_path):
    import transformers

    from models.hf import HF

    config = transformers.ViTConfig(
        **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 10},
        **{"intermediate_size": 8, "image_size": 8, "patch_size": 4, "num_channels": 1},
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "vit")

    keys = {"path": str(tmp_path / "vit"), "auto": "image_classification", "pretrained": True}
    run = student(tmp_path, model=partial(HF, **keys))
    batches = run.batches[0]
    (found,) = seen(run, batches)
    with torch.no_grad():
        expected = theirs(pixel_values=batches[0]["pixel_values"]).logits
    torch.testing.assert_close(found, expected)

    config.num_labels = 7
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "seven")
    with pytest.raises(UsageError, match=r"callbacks\.teacher: it has 7 classes, the task 10"):
        student(tmp_path, model=partial(HF, **keys | {"path": str(tmp_path / "seven")}))


def test_a_language_model_of_transformers(tmp_path):
    import transformers

    from models.hf import HF

    base = [
        *("task=code", "task.path=json", "task.context_length=16", "model.width=16"),
        *("model.depth=1", "model.heads=2", "tracker=none", "trainer.batch_size=4"),
        *("trainer.device=cpu", "trainer.max_steps=2"),
    ]
    config = transformers.GPT2Config(
        **{"vocab_size": 256, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "gpt")
    make = partial(HF, path=str(tmp_path / "gpt"), pretrained=True)
    run = student(tmp_path, base=base, model=make)
    batches = run.batches[0]
    (found,) = seen(run, batches)
    with torch.no_grad():
        expected = theirs(input_ids=batches[0]["input_ids"]).logits
    torch.testing.assert_close(found, expected)


def test_a_model_of_timm(tmp_path):
    from models.timm import Timm, timm

    name = "test_resnet"
    theirs = timm.create_model(name, in_chans=1, num_classes=10).eval()
    weights = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), weights)
    run = student(tmp_path, model=partial(Timm, name=name, checkpoint=str(weights)))
    batches = run.batches[0]
    (found,) = seen(run, batches)
    with torch.no_grad():
        expected = theirs(batches[0]["pixel_values"])
    torch.testing.assert_close(found, expected)

    other = timm.create_model(name, in_chans=1, num_classes=7)
    torch.save(other.state_dict(), weights)
    overlay = {"file": str(weights), "num_classes": 7}
    keys = {"pretrained": True, "keys": {"pretrained_cfg_overlay": overlay}}
    with pytest.raises(UsageError, match="weights are for 7 classes, the task has 10"):
        student(tmp_path, model=partial(Timm, name=name, **keys))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
def test_the_cache_holds_what_the_teacher_says(folder, tmp_path, dtype, tolerance):
    run = student(tmp_path, "trainer.accumulate=2", of=folder, cache=True, dtype=dtype)
    (file,) = root().glob("teacher/*/logits.npy")
    assert np.load(file, mmap_mode="r").dtype == dtype
    assert len(np.load(file, mmap_mode="r")) == len(run.task.train)

    def silent(*_):
        raise AssertionError("asked though cached")

    teacher = run.callbacks["teacher"]
    batches = run.batches[1]
    expected = [direct(folder, batch) for batch in batches]
    teacher.model.forward = silent
    for found, logits in zip(seen(run, batches), expected):
        torch.testing.assert_close(found.float(), logits, rtol=tolerance, atol=tolerance)

    again = tmp_path / "elsewhere"
    shutil.copytree(folder, again)  # the same weights are found wherever they are
    student(tmp_path, of=again, cache=True, dtype=dtype)
    assert len(list(root().glob("teacher/*"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        ["+data.transforms.subset={_target_:tasks.transforms.subset,samples:99}"],
        ["trainer.precision=bf16"],
    ],
)
def test_another_dataset_or_precision_has_a_cache_of_its_own(folder, tmp_path, change):
    student(tmp_path, of=folder, cache=True)
    run = student(tmp_path, *change, of=folder, cache=True)
    assert len(list(root().glob("teacher/*"))) == 2
    batches = run.batches[0]
    torch.testing.assert_close(
        seen(run, batches)[0], direct(folder, batches[0]), rtol=0.02, atol=0.02
    )


def test_other_weights_have_a_cache_of_their_own(folder, tmp_path):
    student(tmp_path, of=folder, cache=True)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    checkpoint = max((other / "checkpoints").glob("step-*"))
    weights = load_file(checkpoint / "model.safetensors")
    weights["head.bias"] += 1
    save_file(weights, checkpoint / "model.safetensors")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    manifest["model.safetensors"] = digest
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    student(tmp_path, of=other, cache=True)
    assert len(list(root().glob("teacher/*"))) == 2


def test_no_cache_where_a_sample_changes(folder, tmp_path):
    run = student(tmp_path)
    plain = run.task.prepare

    def augmented(rows, generator, training):
        batch = plain(rows, generator, training)
        noise = torch.randn(batch["pixel_values"].shape, generator=generator)
        return {**batch, "pixel_values": batch["pixel_values"] + noise}

    run.task.prepare = augmented
    with pytest.raises(UsageError, match=r"cache: the task draws pixel_values anew"):
        Teacher(of=str(folder), cache=True).on_fit_start(run)
    run = student(tmp_path)
    run.config["data"]["batch"] = {"mixup": {}}
    with pytest.raises(UsageError, match=r"cache: data\.batch changes samples"):
        Teacher(of=str(folder), cache=True).on_fit_start(run)


def test_logits_beyond_half_precision_are_not_kept(tmp_path):
    class Loud(nn.Module):
        def forward(self, pixel_values):
            return {"logits": torch.full((len(pixel_values), 10), 1e6)}

    with pytest.raises(UsageError, match=r"dtype: some logits are not finite in float16"):
        student(tmp_path, model=Loud, cache=True, dtype="float16")
    assert list(root().glob("teacher/*")) == []


def test_mistakes_take_one_line(folder, tmp_path):
    with pytest.raises(ValueError, match="of, model: exactly one"):
        Teacher()
    with pytest.raises(ValueError, match="of, model: exactly one"):
        Teacher(of="here", model=nn.Identity)
    with pytest.raises(ValueError, match="dtype: one of float32, float16"):
        Teacher(of="here", dtype="bfloat16")
    empty = tmp_path / "empty"
    shutil.copytree(folder, empty, ignore=shutil.ignore_patterns("checkpoints"))
    wrong = {
        str(folder) + "x": r"of: .*does not exist",
        str(tmp_path): r"of: .*no run folder",
        str(empty): r"of: it has no checkpoint",
        str(folder / "checkpoints" / "step-00000009"): r"of: .*incomplete",
    }
    for of, message in wrong.items():
        with pytest.raises(UsageError, match=r"callbacks\.teacher\." + message) as raised:
            student(tmp_path, of=of)
        assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match=r"MLP does not work on the task's batches \(features"):
        student(tmp_path, "task=tabular", of=folder)


def test_a_folder_of_strange_packages_is_not_imported(folder, tmp_path):
    strange = tmp_path / "strange"
    shutil.copytree(folder, strange)
    config = (strange / "config.yaml").read_text()
    (strange / "config.yaml").write_text(config.replace("torch.nn.ReLU", "antigravity.fly"))
    with pytest.raises(UsageError, match=r"'antigravity.fly' .*callbacks\.teacher\.trust=true"):
        student(tmp_path, of=strange)


def test_a_gradient_estimator_that_goes_forward_twice_is_taught_twice(folder, tmp_path):
    run = student(tmp_path, "technique=sam", of=folder)
    first, second = seen(run, run.batches[0])
    assert first.equal(second)
