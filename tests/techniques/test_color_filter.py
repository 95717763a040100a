from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tasks.fetch import fetch
from techniques.data.selection import Select
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.progress import Progress
from training.train import start

TINY = [
    *("task.path=json", "task.context_length=16", "model.width=8", "model.depth=1"),
    *("model.heads=1", "trainer.device=cpu", "tracker=none", "trainer.batch_size=8"),
    *("trainer.max_steps=2", "trainer.eval_samples=8", "schedule.warmup=0"),
]
NODE = "data.transforms.color_filter"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASSAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A prior, and the same trained on."""
    outputs = f"outputs={tmp_path_factory.mktemp('outputs')}"
    found = []
    for extra in (["name=prior"], ["name=conditional", "optimizer.lr=0.1"]):
        overrides = [*TINY, outputs, *extra]
        if found:
            overrides.append(f"trainer.start_from={found[0]}")
        found.append(start(compose(overrides), overrides, Progress())["run_dir"])
    return found


def filtered(folders, *extra):
    prior, conditional = folders
    overrides = [
        *(*TINY, "technique=color_filter", f"{NODE}.scores.prior={prior}"),
        *(f"{NODE}.scores.conditional={conditional}", *extra),
    ]
    return assemble(compose(overrides))


def losses(folder, run):
    """Mean token losses in float64 of a model rebuilt by other means, (samples,)."""
    model = assemble(compose(TINY)).model.double().eval()
    (path,) = Path(folder).glob("checkpoints/step-*/model.safetensors")
    model.load_state_dict(load_file(path))
    dataset = run.transforms["color_filter"].selection.dataset
    tokens = fetch(dataset, range(len(dataset)))["tokens"].long()
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1])["logits"]
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return each.view(len(tokens), -1).mean(1).numpy()


def test_keeps_the_largest_conditional_loss_reduction(folders):
    """The code's way round: the highest prior − conditional."""
    run = filtered(folders, f"{NODE}.fraction=0.0625")
    prior, conditional = (losses(folder, run) for folder in folders)
    selection = run.transforms["color_filter"].selection
    np.testing.assert_allclose(selection.scores.values, conditional - prior, atol=1e-5)
    count = int(1 / 16 * len(prior))
    expected = np.sort(np.argsort(prior - conditional)[-count:])
    assert len(run.task.train) == count
    assert len(np.setdiff1d(selection.kept, expected)) <= 1  # float32 against float64 at the edge


def test_the_conditional_alone(folders):
    run = filtered(["null", folders[1]], f"{NODE}.scores.conditional_only=true")
    found = run.transforms["color_filter"].selection.scores.values
    np.testing.assert_allclose(found, losses(folders[1], run), atol=1e-5)


def test_scores_are_read_again_unless_a_model_differs(folders):
    fraction = f"{NODE}.fraction=0.5"
    filtered(folders, fraction)
    assert filtered(folders, fraction).transforms["color_filter"].selection.scores.found
    swapped = filtered(folders[::-1], fraction).transforms["color_filter"].selection
    again = filtered(folders, fraction).transforms["color_filter"].selection
    assert not swapped.scores.found
    np.testing.assert_allclose(swapped.scores.values, -again.scores.values, atol=1e-6)


def test_a_model_equal_to_the_prior_gives_nothing(folders):
    same = filtered([folders[0]] * 2, f"{NODE}.fraction=0.25")
    assert not same.transforms["color_filter"].selection.scores.values.any()


def test_settings_reach_it(folders):
    select = filtered(folders).transforms["color_filter"]
    assert isinstance(select, Select)
    assert (select.fraction, select.keep) == (1 / 64, "lowest")


def test_what_does_not_fit_is_told(folders, tmp_path):
    with pytest.raises(UsageError, match=rf"{NODE}\.scores\.prior: which model\?"):
        assemble(compose([*TINY, "technique=color_filter"]))
    with pytest.raises(UsageError, match=rf"{NODE}\.scores\.prior: .* does not exist"):
        filtered([f"{tmp_path}/none", folders[1]])
    with pytest.raises(UsageError, match=rf"{NODE}\.scores\.prior: it does not work"):
        filtered(folders, "task.context_length=32")
