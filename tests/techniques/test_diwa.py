import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tasks.fetch import fetch
from techniques.post.diwa import DiWA
from training import checkpoint
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.evaluate import evaluate
from training.progress import Progress
from training.tracking import NoTracker
from training.trainer import fit

TINY = [
    *(
        "task=rotated_digits",
        "model=mlp",
        "model.width=16",
        "model.norm._target_=torch.nn.BatchNorm1d",
    ),
    *("tracker=none", "trainer.batch_size=16", "trainer.device=cpu", "trainer.max_steps=4"),
    *("schedule.warmup=0", "trainer.eval_samples=null"),
]
RATES = (1e-3, 1e-1, 3e-2)


def trained(folder, *overrides):
    run = assemble(compose([*TINY, *overrides]))
    folder.mkdir()
    run.open(folder)
    assert fit(run, NoTracker(), Progress()) == "completed"
    run.metrics.close()
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three of a model with batch norms, from one start."""
    folder = tmp_path_factory.mktemp("runs")
    return [trained(folder / str(i), f"optimizer.lr={rate}") for i, rate in enumerate(RATES)]


@pytest.fixture
def members(runs):
    """The runs, as they ended."""
    for run in runs:
        checkpoint.load_weights(run.model, run.folder)
        run.recorded = {}
    return runs


def folders(runs):
    return [str(run.folder) for run in runs]


def test_is_the_mean_of_weights_and_statistics(members):
    averaged = AveragedModel(members[0].model, use_buffers=True)
    averaged.update_parameters(members[0].model)
    for run in members[1:]:
        averaged.update_parameters(run.model)
    states = [{n: v.double().numpy() for n, v in run.model.state_dict().items()} for run in members]
    run = members[0]
    DiWA(folders(members[1:]))(run)
    theirs = averaged.module.state_dict()
    for name, value in run.model.state_dict().items():
        if not value.is_floating_point():
            continue
        torch.testing.assert_close(value, theirs[name])
        expected = np.mean([state[name] for state in states], axis=0)
        np.testing.assert_allclose(value.numpy(), expected, rtol=2e-6, atol=2e-7)
    assert run.recorded == {"post/diwa/members": 3}


def test_of_linear_models_it_is_the_ensemble_of_their_logits(tmp_path):
    linear = ["model.depth=0"]
    runs = [
        trained(tmp_path / str(i), *linear, f"optimizer.lr={rate}")
        for i, rate in enumerate((1e-1, 1e-2))
    ]
    images = runs[0].batches[0][0]["pixel_values"]
    with torch.no_grad():
        logits = [run.model(pixel_values=images)["logits"] for run in runs]
        DiWA(folders(runs[1:]))(runs[0])
        merged = runs[0].model(pixel_values=images)["logits"]
    assert not logits[0].allclose(logits[1], atol=0.1)
    torch.testing.assert_close(merged, sum(logits) / 2)


def accuracy(run, states):
    """On the training domains, of the mean of some states."""
    model = assemble(run.config).model
    model.load_state_dict(
        {n: torch.stack([s[n] for s in states]).float().mean(0) for n in states[0]}
    )
    rows = fetch(run.task.validation, torch.arange(len(run.task.validation)))
    batch = run.task.prepare(rows, torch.Generator(), False)
    with torch.no_grad():
        said = model.eval()(pixel_values=batch["pixel_values"])["logits"].argmax(-1)
    correct = (said == batch["labels"])[batch["held_out"] == 0]
    return correct.double().mean().item()


def test_greedy_is_the_authors_procedure(members):
    """Sorted by score, each kept if the mean of those kept is not worse: the weights read anew for
    every mean, as their script does."""
    run = members[0]
    states = [{n: v.clone() for n, v in r.model.state_dict().items()} for r in members]
    ranked = sorted(states, key=lambda s: accuracy(run, [s]), reverse=True)
    kept, best = [], -1.0
    for state in ranked:
        score = accuracy(run, [*kept, state])
        if score >= best:
            kept, best = [*kept, state], score
    DiWA(folders(members[1:]), "greedy", "val/source_accuracy", "higher")(run)
    assert 1 <= len(kept) < 3  # else it would be uniform
    assert run.recorded == {"post/diwa/members": len(kept)}
    assert evaluate(run)["val/source_accuracy"] == pytest.approx(best)
    for name, value in run.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([s[name] for s in kept]).mean(0))


def test_a_run_that_only_merges(members, tmp_path):
    first, *others = folders(members)
    names = [
        *("technique=diwa", "trainer.max_steps=0", f"trainer.start_from={first}"),
        f"post.diwa.of=[{','.join(others)}]",
    ]
    run = trained(tmp_path / "merged", *names)
    assert run.last["post/diwa/members"] == 3
    assert run.last["val/accuracy"] == pytest.approx(members[0].last["val/accuracy"])
    DiWA(others)(members[0])
    again = nn.utils.parameters_to_vector(members[0].model.parameters())
    assert nn.utils.parameters_to_vector(run.model.parameters()).equal(again)
    assert evaluate(members[0])["val/loss"] == run.last["post/diwa/val/loss"]


def test_mistakes(members, tmp_path):
    with pytest.raises(ValueError, match=r"^select: one of uniform, greedy, got 'best'"):
        DiWA([], select="best")
    with pytest.raises(ValueError, match=r"^direction: one of lower, higher"):
        DiWA([], direction="up")
    with pytest.raises(UsageError, match=r"^post.diwa.of: no checkpoint in nowhere"):
        DiWA(["nowhere"])
    with pytest.raises(UsageError, match=r"^post.diwa.metric: no metric 'val/acuracy'"):
        DiWA([], "greedy", "val/acuracy")(members[0])
    other = trained(tmp_path / "other", "model.width=8")
    assert checkpoint.found(other.folder)
    with pytest.raises(UsageError, match=r"^post.diwa.of: .* is of another model"):
        DiWA([str(other.folder)])(members[0])
