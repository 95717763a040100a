import pytest
import torch

from tasks.fetch import fetch
from tasks.pairs import NUMBERS, Pairs
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError


def rows_of(task, count=6):
    return fetch(task.train, torch.arange(count))


def text_of(batch):
    """The captions again."""
    pairs = zip(batch["input_ids"], batch["attention_mask"].sum(1))
    return [bytes(ids[:length].tolist()).decode() for ids, length in pairs]


def test_views_have_the_classes_of_their_images():
    task = Pairs()
    rows = rows_of(task)
    batch = task.prepare(rows, torch.Generator().manual_seed(0), True)
    assert batch["classes"].tolist() == rows["labels"].tolist() * 2
    assert "labels" not in batch
    assert len(batch["pixel_values"]) == 12


def test_plain_images_are_not_changed_and_draw_nothing():
    task, generator = Pairs(), torch.Generator().manual_seed(0)
    before = generator.get_state()
    rows = rows_of(task)
    batch = task.plain(rows, generator)
    assert generator.get_state().equal(before)
    pixels = (rows["pixels"] - task.digits.mean) / task.digits.std
    assert batch["pixel_values"].equal(pixels.view(-1, 1, 8, 8))
    assert batch["labels"].equal(rows["labels"])


def test_captions_of_digits_name_them():
    task = Pairs(text_column="caption")
    rows = rows_of(task, 200)
    batch = task.prepare(rows, torch.Generator().manual_seed(0), True)
    assert batch["classes"].equal(rows["labels"])
    captions = text_of(batch)
    for caption, label in zip(captions, rows["labels"].tolist()):
        assert [n for n in NUMBERS if n in caption.split()] == [NUMBERS[label]]
    wordings = {c.replace(NUMBERS[n], "{}") for c, n in zip(captions, rows["labels"].tolist())}
    assert len(wordings) == 4
    again = task.prepare(rows, torch.Generator().manual_seed(0), False)
    assert text_of(again) == captions
    with pytest.raises(UsageError, match="caption"):
        Pairs(text_column="text")


def test_without_a_loss_the_tasks_own_is_trained():
    run = assemble(compose(["task=pairs", "task.temperature=0.2", "model.width=16"]))
    assert run.objective.loss.__func__ is Pairs.loss
    assert run.task.temperature == 0.2
