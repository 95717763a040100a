"""The RNN-T loss: minus the log-probability of a text over all its alignments with the frames."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tasks.losses import IGNORED, precise

BLANK = 0
"""The class that ends a frame; the symbols are the classes from 1 on."""


def rnnt(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """−log p(labels | frames), each text's spread evenly over its symbols.

    An alignment says at each frame any number of symbols and then a blank. With s symbols said at
    frame t, the joiner's softmax gives the next symbol and the blank; the probability of a text is
    the sum over its alignments of their products. All logits, (batch, frames, symbols + 1,
    classes), exist at once.

    Its minimum, 0, is where the alignments of the right text have all the probability; its
    expectation is minimal where the model's distribution over texts is that of the data. It is in
    [0, ∞) and grows linearly with the logits of what is wrong; it has a gradient wherever they are
    saturated.

    Shapes: `encoder` (batch, frames, dim), `predictor` (batch, symbols + 1, dim) and `joiner`, with
    `attention_mask` (batch, frames) and `labels` (batch, symbols), −100 after a text's end, to
    losses (batch, symbols) in nats.

    Source: "Sequence Transduction with Recurrent Neural Networks", arXiv 1211.3711.
    """
    labels, lengths, frames = sizes(batch)
    logits = outputs["joiner"](outputs["encoder"][:, :, None], outputs["predictor"][:, None])
    following = next_symbols(labels)[:, None].expand(logits.shape[:-1])
    symbol, blank = log_probabilities(logits, following)
    total, _, _ = Alignments.apply(symbol[..., :-1], blank, lengths, frames)
    return per_symbol(-total, labels)


def sizes(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The labels, how many symbols each text has, and how many frames."""
    labels = batch["labels"]
    return labels, (labels != IGNORED).sum(1), batch["attention_mask"].sum(1)


def next_symbols(labels: Tensor) -> Tensor:
    """What follows after 0, 1, ... symbols, (batch, symbols + 1); blank after the end."""
    return F.pad(labels.where(labels != IGNORED, BLANK), (0, 1), value=BLANK)


def per_symbol(values: Tensor, labels: Tensor) -> Tensor:
    """Values of texts (batch,) in equal parts at their symbols, 0 elsewhere, so that the mean over
    symbols weighs every symbol of a batch alike, however it is cut."""
    counted = labels != IGNORED
    return (values / counted.sum(1).clamp(min=1))[:, None] * counted


def log_probabilities(logits: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor]:
    """Those of `symbols` (...) and of the blank, from logits (..., classes)."""
    logits = precise(logits)
    scale = logits.logsumexp(-1)
    return logits.gather(-1, symbols[..., None]).squeeze(-1) - scale, logits[..., BLANK] - scale


class Alignments(torch.autograd.Function):
    """Log-probability of all alignments, and how probable each of their moves is given the text.

    `apply(symbol, blank, lengths, frames)`: `symbol[b, t, s]` is the log-probability of saying the
    symbol after s others at frame t, `blank[b, t, s]` that of ending the frame; −inf where there is
    no such move. In float64, one anti-diagonal of the lattice at a time. The occupancies are the
    gradient, kept in place of a graph; it is of first order only.

    Shapes: (batch, frames, symbols), (batch, frames, symbols + 1), (batch,), (batch,) to (batch,)
    and the occupancies of symbols and blanks, shaped like these.
    """

    @staticmethod
    def forward(
        ctx: Any, symbol: Tensor, blank: Tensor, lengths: Tensor, frames: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, said, ended = _forward_backward(symbol, blank, lengths, frames)
        total, said, ended = total.to(symbol.dtype), said.to(symbol.dtype), ended.to(blank.dtype)
        ctx.save_for_backward(said, ended)
        ctx.mark_non_differentiable(said, ended)
        return total, said, ended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        said, ended = ctx.saved_tensors
        grad = grad[:, None, None]
        return grad * said, grad * ended, None, None


def _forward_backward(
    symbol: Tensor, blank: Tensor, lengths: Tensor, frames: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, states = blank.shape
    late = torch.arange(length, device=blank.device) >= frames[:, None, None]
    moves = (F.pad(symbol, (0, 1), value=-torch.inf), blank)
    up, right = (_skew(m.double().transpose(1, 2).masked_fill(late, -torch.inf)) for m in moves)
    diagonals = length + states - 1
    end = (lengths + frames)[:, None]
    rows = torch.arange(states, device=blank.device)
    last = rows == lengths[:, None]

    # α: of reaching a state from the first; β: of reaching the end from it. By diagonals s + t.
    alpha = [torch.where(rows == 0, 0.0, -torch.inf).double().expand(batch, states)]
    for d in range(diagonals):
        said = F.pad(alpha[-1] + up[..., d], (1, -1), value=-torch.inf)
        alpha.append(torch.logaddexp(alpha[-1] + right[..., d], said))
    beta = [torch.where(last & (end == diagonals), 0.0, -torch.inf).double()]
    for d in reversed(range(diagonals)):
        said = F.pad(beta[-1], (-1, 1), value=-torch.inf) + up[..., d]
        ahead = torch.logaddexp(beta[-1] + right[..., d], said)
        beta.append(ahead.masked_fill(last & (end == d), 0.0))

    reached = torch.stack(alpha, -1)
    total = reached.gather(2, end[:, None].expand(-1, states, -1))[last[..., None]]
    before, after = reached[..., :-1], torch.stack(beta[-2::-1], -1)
    scale = total[:, None, None].masked_fill(total.isinf()[:, None, None], torch.inf)
    said = (before + up + F.pad(after, (0, 0, -1, 1), value=-torch.inf) - scale).exp()
    ended = (before + right + after - scale).exp()
    said, ended = (_unskew(x, length).transpose(1, 2) for x in (said, ended))
    return total, said[..., :-1], ended


def _skew(x: Tensor) -> Tensor:
    """(batch, states, frames) by diagonals: entry (s, t) at (s, s + t), −inf elsewhere."""
    states = x.shape[1]
    wide = F.pad(x, (0, states), value=-torch.inf)
    return wide.flatten(1)[:, :-states].unflatten(1, (states, -1))


def _unskew(x: Tensor, length: int) -> Tensor:
    states = x.shape[1]
    return F.pad(x.flatten(1), (0, states)).unflatten(1, (states, -1))[..., :length]
