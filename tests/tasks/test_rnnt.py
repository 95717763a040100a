import itertools
import math

import pytest
import torch
from torch import nn

from tasks.rnnt import Alignments, log_probabilities, rnnt

INF = math.inf


def draw(batch=3, frames=4, symbols=3, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    symbol = scale * torch.randn(batch, frames, symbols, generator=generator, dtype=torch.float64)
    blank = scale * torch.randn(
        batch, frames, symbols + 1, generator=generator, dtype=torch.float64
    )
    lengths, counts = torch.tensor([symbols, symbols - 1, 1]), torch.tensor([frames, 3, frames])
    return symbol, blank, lengths[:batch], counts[:batch]


def alignments(symbol, blank, length, frames):
    """Every alignment of a text: its moves, as (t, s) of its symbols and of its blanks."""
    for at in itertools.combinations_with_replacement(range(frames), length):
        said = [(t, s) for s, t in enumerate(at)]
        ended = [(t, sum(x <= t for x in at)) for t in range(frames)]
        score = sum(symbol[t, s].item() for t, s in said)
        yield score + sum(blank[t, s].item() for t, s in ended), said, ended


def test_is_the_sum_over_alignments():
    """Totals and occupancies, by enumeration."""
    symbol, blank, lengths, frames = draw()
    totals, said, ended = Alignments.apply(symbol, blank, lengths, frames)
    for b in range(3):
        paths = list(alignments(symbol[b], blank[b], int(lengths[b]), int(frames[b])))
        total = math.log(sum(math.exp(score) for score, _, _ in paths))
        assert totals[b].item() == pytest.approx(total, abs=1e-12)
        expected = torch.zeros_like(symbol[b]), torch.zeros_like(blank[b])
        for score, at, blanks in paths:
            for move in at:
                expected[0][move] += math.exp(score - total)
            for move in blanks:
                expected[1][move] += math.exp(score - total)
        torch.testing.assert_close(said[b], expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ended[b], expected[1], rtol=1e-12, atol=1e-12)


def test_gradcheck():
    symbol, blank, lengths, frames = draw()
    symbol[0, 1, 1] = blank[2, 0, 0] = -INF  # moves that there are not
    kept = symbol.isfinite(), blank.isfinite()

    def total(x, y):
        x, y = x.where(kept[0], -INF), y.where(kept[1], -INF)
        return Alignments.apply(x, y, lengths, frames)[0]

    inputs = [z.where(z.isfinite(), 0).requires_grad_() for z in (symbol, blank)]
    assert torch.autograd.gradcheck(total, inputs)


def test_one_frame_and_impossible_texts():
    symbol, blank = torch.zeros(2, 1, 2), torch.full((2, 1, 3), -1.0)
    blank[1] = -INF
    symbol.requires_grad_()
    lengths, frames = torch.tensor([2, 2]), torch.tensor([1, 1])
    total, _, _ = Alignments.apply(symbol, blank, lengths, frames)
    assert total.tolist() == [-1.0, -INF]
    total.sum().backward()
    assert symbol.grad.tolist() == [[[1.0, 1.0]], [[0.0, 0.0]]]


def test_long_float32_lattices_keep_their_digits():
    symbol, blank, lengths, frames = draw(1, 150, 40, scale=3.0)
    lengths[0], frames[0] = 40, 150
    exact, said, _ = Alignments.apply(symbol, blank, lengths, frames)
    found, rough, _ = Alignments.apply(symbol.float(), blank.float(), lengths, frames)
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    torch.testing.assert_close(rough.double(), said, atol=1e-4, rtol=0)
    assert said.sum().item() == pytest.approx(40)  # each symbol is said once


class Add(nn.Module):
    def forward(self, encoder, predictor):
        return encoder + predictor


def lattice(classes=4, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    encoder, predictor = (
        scale * torch.randn(2, n, classes, generator=generator, dtype=torch.float64) for n in (4, 4)
    )
    batch = {
        "labels": torch.tensor([[1, 3, 2], [2, 2, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    return encoder, predictor, batch


def test_loss_of_the_logits():
    """Each text's loss in equal parts at its symbols; padding takes no part."""
    encoder, predictor, batch = lattice()
    outputs = {"encoder": encoder, "predictor": predictor, "joiner": Add()}
    losses = rnnt(outputs, batch)
    for b, (length, frames) in enumerate([(3, 4), (2, 3)]):
        log_p = (encoder[b, :, None] + predictor[b]).log_softmax(-1)
        symbol = torch.stack([log_p[:, s, batch["labels"][b, s]] for s in range(length)], 1)
        paths = alignments(symbol, log_p[..., 0], length, frames)
        total = math.log(sum(math.exp(score) for score, _, _ in paths))
        assert losses[b, :length].tolist() == pytest.approx([-total / length] * length, abs=1e-12)
        assert not losses[b, length:].any()
    changed = encoder.clone()
    changed[1, 3] = 7.0
    torch.testing.assert_close(rnnt({**outputs, "encoder": changed}, batch), losses)


def test_loss_gradcheck():
    encoder, predictor, batch = lattice()

    def loss(x, y):
        return rnnt({"encoder": x, "predictor": y, "joiner": Add()}, batch)

    assert torch.autograd.gradcheck(loss, (encoder.requires_grad_(), predictor.requires_grad_()))


def test_texts_of_all_lengths_have_probability_one():
    """Over texts of up to n symbols the probabilities approach 1: here one frame, one symbol."""
    log_p = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    total = 0.0
    for n in range(1, 30):
        symbol, blank = log_p[1].expand(1, 1, n), log_p[0].expand(1, 1, n + 1)
        found, _, _ = Alignments.apply(symbol, blank, torch.tensor([n]), torch.tensor([1]))
        total += found.exp().item()
    assert total + 0.6 == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_logits(dtype):
    encoder, predictor, batch = lattice(scale=1e4)
    encoder, predictor = (x.to(dtype).requires_grad_() for x in (encoder, predictor))
    losses = rnnt({"encoder": encoder, "predictor": predictor, "joiner": Add()}, batch)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert encoder.grad.isfinite().all()
    assert encoder.grad.any()
    assert predictor.grad.isfinite().all()


def test_log_probabilities_are_a_softmax_s():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    symbols = torch.tensor([[1, 4, 2], [3, 3, 1]])
    symbol, blank = log_probabilities(logits.bfloat16(), symbols)
    expected = logits.bfloat16().float().log_softmax(-1)
    torch.testing.assert_close(blank, expected[..., 0])
    torch.testing.assert_close(symbol, expected.gather(-1, symbols[..., None])[..., 0])
