from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from study import selections
from study.collect import collect
from study.report import page
from tasks.arrays import as_dataset
from tasks.digits import Digits
from techniques.data.selection import (
    Scores,
    Select,
    Selection,
    extreme,
    over,
    sample_losses,
    scored,
    weighted_mean,
)
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.progress import Progress
from training.train import resume, start

TINY = [
    *("task=digits", "model=mlp", "model.width=8", "tracker=none", "trainer.batch_size=16"),
    *("trainer.device=cpu", "trainer.max_steps=2", "trainer.eval_samples=8", "schedule.warmup=0"),
]
SELECT = (
    "+data.transforms.dark={_target_:techniques.data.selection.Select,keep:lowest,fraction:0.25,"
    "scores:{_target_:tests.techniques.test_selection.brightness}}"
)
WEIGHTED = "+data.transforms.w={_target_:tests.techniques.test_selection.Weighted}"


def brightness(dataset, task, accelerator):
    """Scores of digits: a weighted sum of their pixels."""

    def score():
        weights = torch.arange(64, dtype=torch.float64).sqrt()
        return over(
            lambda batch: batch["pixel_values"].flatten(1) @ weights.float(),
            dataset,
            task,
            accelerator,
        )

    return scored(dataset, task, ["brightness"], score, accelerator)


class Weighted:
    """Twenty samples, each twice, weighing 0.5 and 1.5."""

    def __call__(self, dataset):
        kept = np.repeat(np.arange(20), 2)
        scores = Scores(np.arange(len(dataset), dtype=float), False)
        self.selection = Selection(dataset, None, scores, kept, np.tile([0.5, 1.5], 20))
        return self.selection.chosen()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def digits():
    return Digits()


def test_scores_are_made_once_for_the_same_samples_and_settings(digits, accelerator):
    calls = []

    def ask(dataset, *parts):
        def score():
            calls.append(parts)
            return np.linspace(0, 1, len(dataset))

        return scored(dataset, digits, parts, score, accelerator)

    first, again = ask(digits.train, "a"), ask(digits.train, "a")
    assert not first.found
    assert again.found
    assert first.values.tobytes() == again.values.tobytes()
    assert not ask(digits.train, "b").found
    assert not ask(digits.train.select(range(99)), "a").found
    assert len(calls) == 3


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, np.nan, 2.0]])
def test_refuses_scores_that_are_no_numbers_or_too_few(digits, accelerator, values):
    with pytest.raises(UsageError, match="expected 3 finite scores"):
        scored(digits.train.select(range(3)), digits, [], lambda: np.array(values), accelerator)


def test_every_sample_is_asked_in_order(digits, accelerator):
    pixels = np.asarray(digits.train.with_format("numpy")["pixels"][:])
    found = over(lambda b: b["pixel_values"].flatten(1), digits.train, digits, accelerator, 100)
    expected = (pixels.reshape(len(pixels), -1) - digits.mean) / digits.std
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_samples_loss_is_the_mean_over_the_labels_that_count():
    class Model(torch.nn.Module):
        def forward(self, input_ids):
            return {"logits": input_ids}

    class Task:
        @staticmethod
        def loss(outputs, batch):
            return outputs["logits"].masked_fill(batch["labels"] == -100, 0.0)

    losses = torch.tensor([[1.0, 2.0, 6.0], [4.0, 5.0, 6.0]])
    labels = torch.tensor([[1, 1, -100], [1, 1, 1]])
    batch = {"input_ids": losses, "labels": labels}
    assert sample_losses(Model(), Task())(batch).tolist() == [1.5, 5.0]
    flat = {"input_ids": losses[0], "labels": labels[0]}
    assert sample_losses(Model(), Task())(flat).tolist() == [1.0, 2.0, 0.0]


@pytest.mark.parametrize("keep", ["lowest", "highest"])
@pytest.mark.parametrize("fraction", [0.001, 1 / 3, 0.7, 1.0])
def test_keeps_the_extreme_fraction(keep, fraction):
    values = np.random.default_rng(0).permutation(99).astype(float)
    kept = extreme(values, fraction, keep)
    count = max(int(99 * fraction + 1e-9), 1)
    expected = np.arange(99)[:count] if keep == "lowest" else np.arange(99)[99 - count :]
    assert sorted(values[kept]) == expected.tolist()
    assert (np.diff(kept) > 0).all()


def test_of_equal_scores_the_first_are_kept():
    for keep in ("lowest", "highest"):
        assert extreme(np.zeros(10), 0.3, keep).tolist() == [0, 1, 2]


@pytest.mark.parametrize("settings", [{"fraction": 0.0}, {"fraction": 1.1}, {"keep": "best"}])
def test_refuses_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Select(brightness, **{"fraction": 0.5, "keep": "lowest"} | settings)


def test_a_run_trains_on_what_is_kept_and_shows_it(digits, tmp_path):
    overrides = [*TINY, SELECT, f"outputs={tmp_path}", "trainer.checkpoint_every=1"]
    folder = Path(start(compose(overrides), overrides, Progress())["run_dir"])
    about = selections.found(folder)["dark"]
    pixels = np.array(digits.train.with_format("numpy")["pixels"][:], dtype=float)
    scores = (pixels.reshape(-1, 64) - digits.mean) / digits.std @ np.sqrt(np.arange(64))
    order = np.argsort(scores, kind="stable")[: len(scores) // 4]
    assert about["samples"] == len(scores)
    assert about["kept"] == about["drawn"] == len(order)
    assert about["threshold"] == pytest.approx(scores[order].max(), rel=1e-4)
    assert about["quantiles"]["0.5"] == pytest.approx(np.median(scores), rel=1e-4)
    histogram = about["histogram"]
    assert sum(histogram["kept"]) == len(order)
    assert sum(histogram["dropped"]) == len(scores) - len(order)
    labels = np.array(digits.train["labels"])
    assert about["groups"]["3"] == [(labels == 3).sum(), (labels[order] == 3).sum()]
    assert about["examples"]["lowest"][0]["index"] == order[0]
    assert not about["from_cache"]
    for name in ("dark.png", "dark-examples.png"):
        assert (folder / "selection" / name).stat().st_size > 5000

    run = assemble(compose(overrides))
    assert len(run.task.train) == len(order)
    assert run.transforms["dark"].selection.scores.found
    assert run.batches[0][0]["index"].max() < len(order)

    html = page(collect([str(folder)], str(tmp_path)), "again")
    assert "Selection of training samples" in html
    assert f"{len(order):,} ({len(order) / len(scores):.1%})" in html
    assert 'src="data:image/png;base64,' in html

    more = resume(folder, ["trainer.max_steps=3"], Progress())
    assert more["step"] == 3
    assert selections.found(folder)["dark"]["from_cache"]


def test_scoring_leaves_the_models_start_alone(tmp_path):
    runs = [assemble(compose([*TINY, *extra])) for extra in ([], [SELECT])]
    for one, other in zip(*(run.model.parameters() for run in runs)):
        assert one.equal(other)


def test_weights_reach_their_samples_batch():
    run = assemble(compose([*TINY, WEIGHTED, "trainer.accumulate=2"]))
    assert len(run.task.train) == 40
    for batch in run.batches[1]:
        expected = torch.where(batch["index"] % 2 == 0, 0.5, 1.5)
        assert batch["weight"].equal(expected)


def test_weights_of_two_stages_multiply(digits):
    scores = Scores(np.arange(4.0), False)
    once = Selection(digits.train.select(range(4)), digits, scores, np.arange(4), np.arange(4.0))
    twice = Selection(once.chosen(), digits, scores, np.array([3, 1, 1]), np.array([0.5, 2.0, 1.0]))
    assert list(twice.chosen()["weight"]) == [1.5, 2.0, 1.0]


def test_importance_weights_are_unbiased_and_microbatches_add_up():
    rng = np.random.default_rng(0)
    losses = torch.from_numpy(rng.exponential(size=(50, 4)))
    p = rng.dirichlet(np.ones(50))
    estimates = []
    for _ in range(1000):
        drawn = rng.choice(50, size=8, p=p)
        weights = torch.from_numpy(1 / (50 * p[drawn]))
        batch = {"weight": weights, "labels": torch.ones(8, 4, dtype=torch.int64)}
        whole = weighted_mean(losses[drawn], {}, batch)
        halves = [
            weighted_mean(losses[drawn[part]], {}, {k: v[part] for k, v in batch.items()})
            for part in (slice(0, 4), slice(4, 8))
        ]
        assert float(sum(halves) / 2) == pytest.approx(float(whole), rel=1e-12)
        estimates.append(float(whole))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - float(losses.mean())) < 4 * error


def test_texts_are_shown():
    class Task:
        class tokenizer:
            decode = staticmethod(lambda ids: bytes(ids).decode())

        def prepare(self, rows, generator, training):
            return {"input_ids": rows["tokens"]}

    tokens = np.frombuffer(b"one two six", dtype=np.uint8).reshape(1, -1)
    found = selections.examples(
        as_dataset({"tokens": tokens}), Task(), np.ones(1), np.zeros(1, int)
    )
    assert found["examples"]["highest"][0]["text"] == "one two six"
    assert found["pictures"] is None
