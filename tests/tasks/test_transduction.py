import itertools

import pytest
import torch
from torch import nn

from tasks.fetch import fetch
from tasks.losses import masked_mean
from tasks.transduction import AT_ONCE, Transduction, edit_distance, greedy
from training.errors import UsageError

SMALL = {"path": "tasks", "context_length": 8}


def batch(task, samples=6, seed=0):
    rows = fetch(task.train, torch.arange(samples))
    return task.prepare(rows, torch.Generator().manual_seed(seed), True), rows["tokens"]


def test_frames_spell_the_text():
    """Without noise each frame is its token's pattern, and each token lasts 2 to 6 frames."""
    task = Transduction(**SMALL, noise=0.0)
    found, tokens = batch(task, 30)
    lengths = (found["labels"] != -100).sum(1)
    assert 4 <= lengths.min() < lengths.max() <= 8
    for frames, mask, labels, length, text in zip(
        found["input_features"], found["attention_mask"], found["labels"], lengths, tokens
    ):
        assert labels[:length].equal(text[:length].long() + 1)
        assert (labels[length:] == -100).all()
        count = int(mask.sum())
        assert mask[:count].all()
        assert not frames[count:].any()
        heard = [int(torch.cdist(f[None], task.voice).argmin()) for f in frames[:count]]
        lasts = [(k, len(list(g))) for k, g in itertools.groupby(heard)]
        said = [(k, len(list(g))) for k, g in itertools.groupby(labels[:length].tolist())]
        assert [k for k, _ in lasts] == [k for k, _ in said]
        assert all(2 * n <= frames <= 6 * n for (_, frames), (_, n) in zip(lasts, said))


def test_noise_and_chance_come_from_the_generator():
    task = Transduction(**SMALL, noise=0.5)
    clean = Transduction(**SMALL, noise=0.0)
    assert task.voice.equal(clean.voice)
    first, again, other = batch(task)[0], batch(task)[0], batch(task, seed=1)[0]
    assert all(first[k].equal(again[k]) for k in first)
    assert first["input_features"].shape != other["input_features"].shape
    noise = (first["input_features"] - batch(clean)[0]["input_features"])[
        first["attention_mask"].bool()
    ]
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    assert task.dims == {"vocab_size": 257, "frames": 48, "frame_features": 16}
    assert task.count(first) == 6


class Heard(nn.Module):
    """Says symbol s where the frame holds s and it has not been the last one said."""

    context = 1

    def forward(self, *inputs):
        if len(inputs) == 1:
            return inputs[0][..., 0]
        frames, last = inputs
        return nn.functional.one_hot(torch.where(frames == last, 0, frames), 9).float()


def test_greedy_decoding():
    frames = torch.tensor([[3, 3, 5, 3, 0], [4, 4, 7, 7, 7]])
    outputs = {"encoder": frames, "prediction": Heard(), "joiner": Heard()}
    assert greedy(outputs, torch.tensor([5, 2])) == [[3, 5, 3], [4]]
    labels = torch.tensor([[3, 5, 5, 3], [4, -100, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    scores = Transduction(**SMALL).scores(outputs, {"labels": labels, "attention_mask": mask})
    score = masked_mean(scores["error_rate"], outputs, {"labels": labels})
    assert score.item() == pytest.approx(1 / 5)  # one edit of five symbols


def test_greedy_decoding_ends():
    class Talker(Heard):
        def forward(self, *inputs):
            return inputs[0] if len(inputs) == 1 else torch.eye(3)[1:2].expand(len(inputs[0]), -1)

    outputs = {"encoder": torch.zeros(2, 3, 1), "prediction": Talker(), "joiner": Talker()}
    assert [len(said) for said in greedy(outputs, torch.tensor([3, 1]))] == [3 * AT_ONCE, AT_ONCE]

    class Silent(Talker):
        def forward(self, *inputs):
            return super().forward(*inputs).roll(-1, -1)

    outputs |= {"joiner": Silent()}
    assert greedy(outputs, torch.tensor([3, 1])) == [[], []]


def test_edit_distance():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        if a[-1] == b[-1]:
            return slow(a[:-1], b[:-1])
        return 1 + min(slow(a[:-1], b), slow(a, b[:-1]), slow(a[:-1], b[:-1]))

    generator = torch.Generator().manual_seed(0)
    for first, second in itertools.product(range(6), repeat=2):
        a = torch.randint(3, (first,), generator=generator).tolist()
        b = torch.randint(3, (second,), generator=generator).tolist()
        assert edit_distance(a, b) == slow(a, b)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("features", {"features": 0}),
        ("shortest", {"shortest": 0}),
        ("longest", {"shortest": 3, "longest": 2}),
        ("noise", {"noise": -1.0}),
    ],
)
def test_refusals(name, keys):
    with pytest.raises(UsageError, match=rf"task\.{name}"):
        Transduction(**SMALL, **keys)
