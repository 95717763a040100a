"""Pruned RNN-T: the joiner runs only where a simpler one says that the alignments are."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.rnnt import Alignments, log_probabilities, next_symbols, per_symbol, sizes
from training.errors import UsageError

if TYPE_CHECKING:
    from training.run import Run


class PrunedRNNT:
    """simple_scale · simple + pruned, two RNN-T losses of which the second is that of the model.

    The simple one's joiner adds the logits of encoder and predictor, am[t] + lm[s], so that its
    normalisers are one matrix product of exp(am) and exp(lm), without the (frames, symbols,
    classes) logits. Its log-probabilities are mixed with those of lm alone, as
    (1 − lm_scale)·log p(t, s) + lm_scale·log p_lm(s). How probable its moves are given the text
    (its gradient) chooses at each frame `s_range` numbers of symbols said so far: the window with
    the most blanks in it, less the symbol that leads into its first, then made to begin at 0, end
    at the last symbol, never go back and never advance by `s_range`. The pruned loss is that of the
    alignments within, whose logits are (frames, s_range, classes).

    Args:
        s_range: numbers of symbols kept at each frame, at least 2; 5 in the authors' recipe. Where
            a text has more symbols for its frames than can be passed that way, as many as it needs.
        lm_scale: of the smoothing, in [0, 1]; 0.25 in the recipe. Its `am_scale`, which is 0 there,
            is left out: it makes a text's loss depend on the rest of the batch.
        simple_scale: 0.5 in the recipe.

    Both scales warm up when `WarmUp` is among the callbacks. Beside the pruned logits the memory is
    that of `am`, `lm` and lattices of (frames, symbols) numbers in float64.

    Minimum and range: the simple and the pruned loss are each in [0, ∞) and 0 where the alignments
    of the right text have all the probability (with smoothing also lm alone must say it, so the
    simple one is above 0 and pulls am and lm, and what they share with the model, from the RNN-T
    loss's minimiser). The pruned loss is at least the RNN-T loss, whose alignments include its own.
    At saturated logits both are linear in them. The simple one's matrix product loses normalisers
    where am and lm agree on no class within a factor of about 1e32 (e^73): the value stays finite,
    too small a probability, and the gradient too.

    Shapes: `am` (batch, frames, classes), `lm` (batch, symbols + 1, classes), `encoder` (batch,
    frames, dim), `predictor` (batch, symbols + 1, dim) and `joiner`, with `attention_mask` and
    `labels` (batch, symbols), to losses (batch, symbols), each text's in equal parts.

    Raises:
        ValueError: for an argument out of its range.
        UsageError: for a model without `am` and `lm`.

    Source: "Pruned RNN-T for fast, memory-efficient ASR training", arXiv 2206.13236;
    https://github.com/k2-fsa/fast_rnnt, `fast_rnnt/python/fast_rnnt/rnnt_loss.py` (whose windows
    are those of the paper's section 3.2; https://github.com/danpovey/fast_rnnt has an older rule),
    and https://github.com/k2-fsa/icefall, `egs/librispeech/ASR/pruned_transducer_stateless/
    train.py` for the defaults.
    """

    def __init__(self, s_range: int = 5, lm_scale: float = 0.25, simple_scale: float = 0.5) -> None:
        if s_range < 2:
            raise ValueError(f"s_range: must be at least 2, got {s_range}")
        if not 0 <= lm_scale <= 1:
            raise ValueError(f"lm_scale: must be in [0, 1], got {lm_scale}")
        if simple_scale < 0:
            raise ValueError(f"simple_scale: must be 0 or more, got {simple_scale}")
        self.s_range, self.lm_scale, self.simple_scale = s_range, lm_scale, simple_scale
        self.warmth = 1.0

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        if "am" not in outputs or "lm" not in outputs:
            raise UsageError(
                "task.loss: pruned_rnnt needs a model that returns `am` and `lm` (the transducer "
                f"with model.simple_joiner=true); this one returns {', '.join(outputs)}"
            )
        labels, lengths, frames = sizes(batch)
        following = next_symbols(labels)
        with torch.autocast(labels.device.type, enabled=False):
            symbol, blank = simple(outputs["am"], outputs["lm"], following, self.lm_scale)
            simple_total, said, ended = Alignments.apply(symbol, blank, lengths, frames)
        band = windows(said, ended, lengths, frames, self.s_range)
        predictor = outputs["predictor"][_rows(band), band]
        logits = outputs["joiner"](outputs["encoder"][:, :, None], predictor)
        moves = log_probabilities(logits, following[_rows(band), band])
        symbol, blank = (
            torch.full_like(blank, -torch.inf, dtype=move.dtype).scatter(2, band, move)
            for move in moves
        )
        total, _, _ = Alignments.apply(symbol[..., :-1], blank, lengths, frames)
        first = 1 - self.warmth * (1 - self.simple_scale)
        second = 0.1 + 0.9 * self.warmth
        return per_symbol(-first * simple_total - second * total, labels)


class WarmUp:
    """The scale of the simple loss goes from 1 to its own and that of the pruned one from 0.1 to 1,
    linearly: while the simple joiner knows nothing, the windows are in the wrong places.

    Args:
        steps: it takes; 2,000 in the authors' latest recipe, 0 (none) in the paper's.

    Raises:
        ValueError: for a negative number of steps.

    Source: https://github.com/k2-fsa/icefall, `egs/librispeech/ASR/zipformer/train.py`.
    """

    def __init__(self, steps: int = 2000) -> None:
        if steps < 0:
            raise ValueError(f"steps: must be 0 or more, got {steps}")
        self.steps = steps

    def on_batch(self, run: "Run") -> None:
        """Tell the loss how far the warm-up is."""
        loss: Any = run.objective.loss
        loss.warmth = min(run.step / self.steps, 1.0) if self.steps else 1.0


def simple(am: Tensor, lm: Tensor, following: Tensor, lm_scale: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of saying the next symbol, (batch, frames, symbols), and of the blank,
    (batch, frames, symbols + 1), of the joiner that adds, smoothed."""
    kind = torch.promote_types(am.dtype, torch.float32)
    am, lm = am.to(kind), lm.to(kind)
    am_max, lm_max = am.amax(-1, keepdim=True), lm.amax(-1, keepdim=True)
    product = (am - am_max).exp() @ (lm - lm_max).exp().transpose(1, 2)
    # The authors add the smallest number; below one far from it, gradients could overflow.
    scale = product.clamp(min=1e6 * torch.finfo(kind).tiny).log() + am_max + lm_max.transpose(1, 2)
    lm_only, mixed = lm.log_softmax(-1), 1 - lm_scale

    symbols = following[:, :-1]
    by_frame = symbols[:, None].expand(-1, am.shape[1], -1)
    by_state = symbols[..., None]
    symbol = am.gather(2, by_frame) + lm[:, :-1].gather(2, by_state).transpose(1, 2)
    symbol = mixed * (symbol - scale[..., :-1])
    symbol = symbol + lm_scale * lm_only[:, :-1].gather(2, by_state).transpose(1, 2)
    blank = mixed * (am[..., :1] + lm[..., :1].transpose(1, 2) - scale)
    return symbol, blank + lm_scale * lm_only[..., :1].transpose(1, 2)


def windows(said: Tensor, ended: Tensor, lengths: Tensor, frames: Tensor, s_range: int) -> Tensor:
    """Numbers of symbols kept at each frame, (batch, frames, s_range), from the occupancies."""
    _, count, states = ended.shape
    needed = int(((lengths - 1) // frames + 2).max())
    width = min(max(s_range, needed), states)
    starts = states - width + 1
    inside = ended.unfold(2, width, 1).sum(-1) - F.pad(said, (1, 0))[..., :starts]
    time = torch.arange(count, device=ended.device)
    last = (lengths - width + 1).clamp(min=0)[:, None]
    start = inside.argmax(-1).where(time < frames[:, None] - 1, last)
    # Never back, and never on by `width` or more, which would lose every alignment.
    fastest = (width - 1) * time
    start = fastest - _lower(fastest - _lower(start)).clamp(min=0)
    return start[..., None] + torch.arange(width, device=ended.device)


def _lower(x: Tensor) -> Tensor:
    """The largest rising sequence that is nowhere above x."""
    return x.flip(-1).cummin(-1).values.flip(-1)


def _rows(band: Tensor) -> Tensor:
    return torch.arange(len(band), device=band.device)[:, None, None]
