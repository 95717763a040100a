import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from training.assemble import assemble
from training.compose import compose
from training.data import Mixture, StepBatches
from training.errors import UsageError
from training.progress import Progress
from training.train import resume, start

SIZES = {"big": 70, "small": 20, "tiny": 10}
DOMAINS = np.repeat(range(3), list(SIZES.values()))


class Corpora:
    """A task of three domains whose samples are their own index."""

    domains = tuple(SIZES)
    train = Dataset.from_dict({"labels": list(range(100)), "domain": DOMAINS})

    def prepare(self, rows, generator, training):
        return {"labels": rows["labels"]}


def mixture(seed=0, **weights):
    return Mixture(100, seed, Corpora(), weights or {"big": 0.2, "small": 0.3, "tiny": 0.5})


def domains(order):
    return DOMAINS[order.numpy()]


def counts(order):
    return np.bincount(domains(order), minlength=3)


@pytest.mark.parametrize(
    "weights", [(0.2, 0.3, 0.5), (1, 1, 1), (5.5, 0, 0.123), (1, 1e-9, 3), (0, 2, 0)]
)
def test_every_epoch_has_the_proportions_to_one_sample(weights):
    shares = np.array(weights) / sum(weights)
    sampler = mixture(**dict(zip(SIZES, weights)))
    for epoch in range(20):
        order = sampler.indices(epoch)
        assert len(order) == 100
        assert (np.abs(counts(order) - 100 * shares) < 1).all()


def test_proportions_are_exact_in_expectation():
    """Means over epochs, of whole epochs and of one place in them."""
    weights = np.array([0.333, 0.333, 0.334])
    sampler = mixture(**dict(zip(SIZES, weights)))
    orders = [sampler.indices(epoch) for epoch in range(1000)]
    found = np.array([counts(order) for order in orders])
    error = found.std(0) / math.sqrt(1000)
    assert (np.abs(found.mean(0) - 100 * weights) < 4 * error + 1e-12).all()
    for place in (0, 57):
        hits = np.bincount([domains(order[place : place + 1])[0] for order in orders], minlength=3)
        error = np.sqrt(weights * (1 - weights) / 1000)
        assert (np.abs(hits / 1000 - weights) < 4 * error).all()


def test_an_exhausted_domain_begins_again_once_all_were_seen():
    order = mixture().indices(3)
    seen = np.bincount(order.numpy(), minlength=100)
    assert set(seen[:70]) == {0, 1}  # 20 of 70
    assert set(seen[70:90]) == {1, 2}  # 30 of 20
    assert set(seen[90:]) == {5}  # 50 of 10


def test_an_epoch_is_a_function_of_seed_and_number_alone():
    first, second = mixture(), mixture()
    for epoch in range(3):
        first.indices(epoch)
    assert first.indices(3).equal(second.indices(3))
    assert not first.indices(3).equal(first.indices(4))
    assert not mixture(seed=1).indices(3).equal(first.indices(3))


def test_processes_and_microbatches_split_the_same_samples():
    def seen(step, **keys):
        source = StepBatches(Corpora(), mixture(), 12, keys.pop("accumulate", 1), [], 0, **keys)
        return [int(i) for batch in source[step] for i in batch["labels"]]

    for step in (0, 7, 8, 30):  # step 8 has samples of two epochs
        whole = seen(step)
        assert seen(step, accumulate=3) == whole
        shards = [seen(step, accumulate=2, rank=rank, world=2) for rank in (0, 1)]
        assert sorted(shards[0] + shards[1]) == sorted(whole)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"bigg": 1.0}, "no domain 'bigg'; did you mean 'big'"),
        ({"big": -1.0, "small": 2.0}, "weights"),
        ({"big": 0.0}, "weights"),
    ],
)
def test_refuses_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        mixture(**weights)


def test_refuses_a_task_without_domains_and_a_domain_without_samples():
    with pytest.raises(UsageError, match=r"data\.sampler\.weights: the task has no domains"):
        Mixture(3, 0, object(), {"big": 1.0})
    task = Corpora()
    task.train = Corpora.train.select(range(70))
    with pytest.raises(UsageError, match="no training sample is of 'tiny'"):
        Mixture(70, 0, task, {"tiny": 1.0})


TINY = [
    *("task=domains", "task.domains=[json,{tables:sqlite3}]", "task.context_length=32"),
    *("data.sampler._target_=training.data.Mixture", "+data.sampler.weights={tables:1}"),
    *("model.width=16", "model.depth=1", "model.heads=2", "trainer.device=cpu", "tracker=none"),
    *("trainer.batch_size=8", "trainer.eval_samples=8", "trainer.log_every=1"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))


def test_a_run_of_one_domain_draws_it_alone():
    run = assemble(compose(TINY))
    assert set(run.batches[5][0]["domain"].tolist()) == {1}
    with pytest.raises(UsageError, match="did you mean 'tables'"):
        assemble(compose([*TINY, "+data.sampler.weights.table=1"]))


def test_a_run_resumed_ends_in_the_same_bits(tmp_path):
    overrides = [
        *(*TINY, "+data.sampler.weights.json=3", f"outputs={tmp_path}", "trainer.eval_every=3"),
        *("trainer.max_steps=6", "trainer.checkpoint_every=3", "trainer.keep_checkpoints=9"),
    ]
    whole = Path(start(compose(overrides), overrides, Progress())["run_dir"])
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    (cut / "summary.json").unlink()
    resume(cut, [], Progress())
    final = Path("checkpoints") / "step-00000006" / "model.safetensors"
    assert (cut / final).read_bytes() == (whole / final).read_bytes()
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert "val/loss_tables" in (whole / "metrics.jsonl").read_text()
