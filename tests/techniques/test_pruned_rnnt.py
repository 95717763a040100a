import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tasks.rnnt import Alignments, per_symbol, rnnt
from techniques.loss.pruned_rnnt import PrunedRNNT, WarmUp, simple, windows
from tests.tasks.test_rnnt import alignments
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

CLASSES, WIDTH = 6, 6


class Joiner(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)

    def forward(self, encoder, predictor):
        return self.head((encoder + predictor).tanh())


def draw(frames=7, symbols=5, scale=1.0):
    torch.manual_seed(0)
    made = lambda *shape: scale * torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    outputs = {
        **{"encoder": made(2, frames, WIDTH), "predictor": made(2, symbols + 1, WIDTH)},
        **{"am": made(2, frames, CLASSES), "lm": made(2, symbols + 1, CLASSES)},
        "joiner": Joiner(),
    }
    labels = torch.randint(1, CLASSES, (2, symbols))
    labels[1, symbols - 2 :] = -100
    mask = torch.ones(2, frames, dtype=torch.long)
    mask[1, frames - 1 :] = 0
    return outputs, {"labels": labels, "attention_mask": mask}


def sizes(batch):
    return (batch["labels"] != -100).sum(1), batch["attention_mask"].sum(1)


def log_sum(scores):
    return math.log(sum(math.exp(score) for score in scores))


def smoothed(am, lm, labels, lm_scale):
    """The simple joiner's log-probabilities of a text's moves, one softmax at a time."""
    symbol = np.full((len(am), len(lm) - 1), -math.inf)
    blank = np.zeros((len(am), len(lm)))
    alone = lm.log_softmax(-1)
    for t in range(len(am)):
        for s in range(len(lm)):
            both = (am[t] + lm[s]).log_softmax(-1)
            blank[t, s] = (1 - lm_scale) * both[0] + lm_scale * alone[s, 0]
            if s < len(labels) and labels[s] != -100:
                label = int(labels[s])
                symbol[t, s] = (1 - lm_scale) * both[label] + lm_scale * alone[s, label]
    return symbol, blank


def chosen(said, ended, length, frames, width):
    """The authors' windows of one text, by their definition, one frame at a time."""
    states = ended.shape[1]
    starts = []
    for t in range(len(ended)):
        if t >= frames - 1:
            starts.append(max(length - width + 1, 0))
            continue
        gains = []
        for s in range(states - width + 1):
            entering = said[t, s - 1] if s else 0.0
            gains.append(sum(ended[t, s : s + width]) - entering)
        starts.append(int(np.argmax(gains)))
    for t in reversed(range(len(starts) - 1)):  # never back
        starts[t] = min(starts[t], starts[t + 1])
    for t in reversed(range(len(starts) - 1)):  # and never on by `width`
        starts[t] = max(starts[t], starts[t + 1] - width + 1)
    return [min(start, (width - 1) * t) for t, start in enumerate(starts)]


@pytest.mark.parametrize(("s_range", "lm_scale"), [(2, 0.25), (3, 0.25), (3, 0.0), (4, 0.6)])
def test_is_the_authors_method(s_range, lm_scale):
    """Against loops in float64: the simple loss and the pruned one by enumeration."""
    outputs, batch = draw()
    loss = PrunedRNNT(s_range=s_range, lm_scale=lm_scale, simple_scale=0.5)
    found = loss(outputs, batch)
    lengths, counts = (x.tolist() for x in sizes(batch))
    for b, (length, frames) in enumerate(zip(lengths, counts)):
        labels = batch["labels"][b]
        symbol, blank = smoothed(outputs["am"][b], outputs["lm"][b], labels, lm_scale)
        paths = list(alignments(symbol, blank, length, frames))
        first = log_sum(score for score, _, _ in paths)
        said, ended = np.zeros_like(symbol), np.zeros_like(blank)
        for score, at, blanks in paths:
            for move in at:
                said[move] += math.exp(score - first)
            for move in blanks:
                ended[move] += math.exp(score - first)
        starts = chosen(said, ended, length, frames, s_range)
        log_p = outputs["joiner"](outputs["encoder"][b, :, None], outputs["predictor"][b])
        log_p = log_p.log_softmax(-1).detach()
        full = torch.stack([log_p[:, s, labels[s]] for s in range(length)], 1)
        within = [
            score
            for score, at, blanks in alignments(full, log_p[..., 0], length, frames)
            if all(starts[t] <= s < starts[t] + s_range for t, s in (*at, *blanks))
        ]
        expected = -(0.5 * first + log_sum(within)) / length
        np.testing.assert_allclose(found[b, :length].detach(), expected, rtol=1e-10)
        assert not found[b, length:].any()


def test_with_room_for_all_symbols_it_is_the_whole_loss():
    outputs, batch = draw()
    pruned = PrunedRNNT(s_range=99, simple_scale=0.0)
    inputs = [outputs["encoder"].requires_grad_(), outputs["joiner"].head.weight]
    found, expected = pruned(outputs, batch), rnnt(outputs, batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(found.sum(), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), inputs))


def test_is_never_below_the_whole_loss():
    outputs, batch = draw(20, 12)
    whole = rnnt(outputs, batch)
    losses = [PrunedRNNT(s_range=k, simple_scale=0.0)(outputs, batch) for k in (3, 6, 13)]
    assert all((loss >= whole - 1e-12).all() for loss in losses)
    assert losses[0].sum() > losses[1].sum() > losses[2].sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("s_range", [2, 3, 5])
def test_windows(seed, s_range):
    """From 0 to the last symbol, never back, never on by their width: some alignment survives."""
    generator = torch.Generator().manual_seed(seed)
    lengths, frames = torch.tensor([14, 9, 1, 14]), torch.tensor([20, 9, 20, 3])
    symbol = 3 * torch.randn(4, 20, 14, generator=generator)
    blank = 3 * torch.randn(4, 20, 15, generator=generator)
    _, said, ended = Alignments.apply(symbol, blank, lengths, frames)
    band = windows(said, ended, lengths, frames, s_range)
    width = band.shape[2]
    assert width == max(s_range, 13 // 3 + 2)  # 14 symbols in 3 frames need 6
    assert (band.diff(dim=2) == 1).all()
    assert band.min() == 0
    assert band.max() <= 14
    steps = band[..., 0].diff(dim=1)
    assert (steps >= 0).all()
    assert (steps < width).all()
    assert not band[:, 0, 0].any()
    for b, (length, count) in enumerate(zip(lengths, frames)):
        assert length in band[b, count - 1]
    kept = torch.full_like(blank, -math.inf).scatter(2, band, blank.gather(2, band))
    total, _, _ = Alignments.apply(symbol, kept, lengths, frames)
    assert total.isfinite().all()


def test_windows_follow_the_alignment():
    """A certain alignment, two frames a symbol, is inside, and nothing of the loss is lost."""
    frames, symbols = 20, 10
    at = torch.arange(frames) // 2
    symbol = torch.full((1, frames, symbols), -50.0)
    symbol[0, torch.arange(0, frames, 2), torch.arange(symbols)] = 0.0
    blank = torch.full((1, frames, symbols + 1), -50.0)
    blank[0, torch.arange(frames), at + 1] = 0.0
    lengths, counts = torch.tensor([symbols]), torch.tensor([frames])
    _, said, ended = Alignments.apply(symbol, blank, lengths, counts)
    band = windows(said, ended, lengths, counts, 3)
    assert (band == (at + 1)[None, :, None]).any(2).all()
    assert (band == at[None, :, None]).any(2)[0, ::2].all()  # where a symbol is said


def test_simple_loss_gradcheck():
    outputs, batch = draw(4, 3)
    following = torch.cat([batch["labels"].clamp(min=0), torch.zeros(2, 1, dtype=torch.long)], 1)
    lengths, frames = sizes(batch)

    def total(am, lm):
        return Alignments.apply(*simple(am, lm, following, 0.25), lengths, frames)[0]

    assert torch.autograd.gradcheck(
        total, (outputs["am"].requires_grad_(), outputs["lm"].requires_grad_())
    )


def test_gradcheck():
    """Of the whole loss; the windows do not move within the steps of the check."""
    outputs, batch = draw(4, 3)
    names = ("am", "lm", "encoder", "predictor")
    loss = PrunedRNNT(s_range=2)

    def value(*inputs):
        return loss({**outputs, **dict(zip(names, inputs))}, batch)

    assert torch.autograd.gradcheck(value, [outputs[k].requires_grad_() for k in names])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_logits(dtype):
    outputs, batch = draw(30, 12, scale=1e4)
    outputs["joiner"] = lambda encoder, predictor: encoder + predictor
    inputs = {
        k: outputs[k].to(dtype).requires_grad_() for k in ("am", "lm", "encoder", "predictor")
    }
    losses = PrunedRNNT()({**outputs, **inputs}, batch)
    losses.sum().backward()
    assert losses.isfinite().all()
    for name, x in inputs.items():
        assert x.grad.isfinite().all(), name
        assert x.grad.any(), name


def test_warm_up():
    """From 1 and 0.1 to the scales asked for, by the steps that the run has done."""
    outputs, batch = draw()
    loss = PrunedRNNT(simple_scale=0.5)
    run = SimpleNamespace(step=0, objective=SimpleNamespace(loss=loss))
    parts = []
    for step, scales in ((0, (1.0, 0.1)), (5, (0.75, 0.55)), (10, (0.5, 1.0)), (99, (0.5, 1.0))):
        run.step = step
        WarmUp(steps=10).on_batch(run)
        parts.append((*scales, loss(outputs, batch)[0, 0].item()))
    # The values are linear in the scales, with the two losses as coefficients.
    a, b = np.linalg.lstsq(np.array(parts)[:, :2], np.array(parts)[:, 2], rcond=None)[0]
    for first, second, value in parts:
        assert value == pytest.approx(first * a + second * b, abs=1e-12)
    lengths, frames = sizes(batch)
    following = torch.cat([batch["labels"].clamp(min=0), torch.zeros(2, 1, dtype=torch.long)], 1)
    moves = simple(outputs["am"], outputs["lm"], following, 0.25)
    total, _, _ = Alignments.apply(*moves, lengths, frames)
    assert a == pytest.approx(per_symbol(-total, batch["labels"])[0, 0].item())
    run.step = 3
    WarmUp(steps=0).on_batch(run)
    assert loss.warmth == 1


def test_overlay():
    keys = ["task=transduction", "technique=pruned_rnnt", "task.path=tasks", "trainer.device=cpu"]
    keys += ["task.loss.s_range=3", "task.loss.lm_scale=0.1", "task.loss.simple_scale=0.2"]
    keys += ["callbacks.pruned_rnnt.steps=7", "model.width=16", "model.depth=1", "model.heads=2"]
    run = assemble(compose(keys))
    loss = run.objective.loss
    assert (loss.s_range, loss.lm_scale, loss.simple_scale) == (3, 0.1, 0.2)
    assert run.callbacks["pruned_rnnt"].steps == 7
    assert run.model.simple_am is not None


def test_refusals():
    outputs, batch = draw()
    del outputs["am"]
    with pytest.raises(UsageError, match="simple_joiner"):
        PrunedRNNT()(outputs, batch)
    for name, value in {"s_range": 1, "lm_scale": 1.5, "simple_scale": -1.0}.items():
        with pytest.raises(ValueError, match=name):
            PrunedRNNT(**{name: value})
    with pytest.raises(ValueError, match="steps"):
        WarmUp(-1)
