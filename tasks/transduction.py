"""Sequence transduction: text from the frames of a synthetic voice that spells it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tasks import rnnt
from tasks.code import code
from tasks.losses import IGNORED
from training.errors import UsageError

AT_ONCE = 4
"""Symbols that greedy decoding may say at one frame."""


class Transduction:
    """Write down what was spelt: each token is a fixed random pattern, held for a random number of
    frames and heard through noise.

    The text is that of the task `code`, cut into pieces of random lengths. Class 0 is the blank of
    RNN-T; token i is class i + 1.

    Args:
        context_length: tokens of the longest piece; the shortest has half as many.
        features: numbers in a frame. A pattern's are drawn from N(0, 1), once for all runs.
        noise: standard deviation of what is added to each.
        shortest, longest: frames that a token lasts, each number as likely.
        tokenizer, vocab_size, path: as in the task `code`.

    Raises:
        UsageError: for sizes that do not fit, or text that is not there.
    """

    unit = "samples"

    def __init__(
        self,
        *,
        context_length: int = 32,
        features: int = 16,
        noise: float = 1.0,
        shortest: int = 2,
        longest: int = 6,
        tokenizer: str = "bytes",
        vocab_size: int = 4096,
        path: str | None = None,
    ) -> None:
        for name, value in {"features": features, "shortest": shortest}.items():
            if value < 1:
                raise UsageError(f"task.{name}: must be at least 1, got {value}")
        if longest < shortest:
            raise UsageError(f"task.longest: at least task.shortest={shortest}, got {longest}")
        if noise < 0:
            raise UsageError(f"task.noise: must be 0 or more, got {noise}")
        text = code(
            context_length=context_length, tokenizer=tokenizer, vocab_size=vocab_size, path=path
        )
        self.train, self.validation = text.train, text.validation
        self.context_length, self.noise = context_length, noise
        self.shortest, self.longest = shortest, longest
        classes = text.dims["vocab_size"] + 1
        self.voice = torch.randn(classes, features, generator=torch.Generator().manual_seed(0))
        self.dims = {
            "vocab_size": classes,
            "frames": context_length * longest,
            "frame_features": features,
        }

    def count(self, batch: dict[str, Any]) -> int:
        """Pieces of text in a batch."""
        return len(batch["labels"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`input_features` (batch, frames, features) and `attention_mask` (batch, frames), 0 after
        a piece's end, and `labels` (batch, context_length), −100 there."""
        symbols = rows["tokens"][:, :-1].long() + 1
        shape = symbols.shape
        least = (self.context_length + 1) // 2
        lengths = torch.randint(least, self.context_length + 1, shape[:1], generator=generator)
        said = torch.arange(shape[1]) < lengths[:, None]
        lasts = torch.randint(self.shortest, self.longest + 1, shape, generator=generator) * said
        ends = lasts.cumsum(1)
        time = torch.arange(int(ends.max())).expand(shape[0], -1).contiguous()
        mask = time < ends[:, -1:]
        now = torch.searchsorted(ends, time, right=True).clamp(max=shape[1] - 1)
        heard = self.voice[symbols.gather(1, now)]
        heard = heard + self.noise * torch.randn(heard.shape, generator=generator)
        return {
            "input_features": heard * mask[..., None],
            "attention_mask": mask.long(),
            "labels": symbols.where(said, torch.tensor(IGNORED)),
        }

    loss = staticmethod(rnnt.rnnt)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`error_rate`: edits from the text decoded greedily to the right one, per right symbol."""
        labels, _, frames = rnnt.sizes(batch)
        said = greedy(outputs, frames)
        right = [row[row != IGNORED].tolist() for row in labels]
        edits = [float(edit_distance(ours, theirs)) for ours, theirs in zip(said, right)]
        return {"error_rate": rnnt.per_symbol(torch.tensor(edits, device=labels.device), labels)}


def greedy(outputs: Any, frames: Tensor) -> list[list[int]]:
    """At each frame the likeliest symbols, until the blank is likelier or there are `AT_ONCE`."""
    encoder, predictor, joiner = (outputs[k] for k in ("encoder", "prediction", "joiner"))
    history = frames.new_full((len(frames), predictor.context), rnnt.BLANK)
    said = []
    for t in range(encoder.shape[1]):
        talking = t < frames
        for _ in range(AT_ONCE):
            symbol = joiner(encoder[:, t], predictor(history)).argmax(-1)
            talking = talking & (symbol != rnnt.BLANK)
            if not talking.any():
                break
            said.append(symbol.where(talking, rnnt.BLANK))
            longer = torch.cat([history[:, 1:], symbol[:, None]], 1)
            history = longer.where(talking[:, None], history)
    if not said:
        return [[] for _ in frames]
    return [row[row != rnnt.BLANK].tolist() for row in torch.stack(said, 1)]


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """Fewest insertions, deletions and substitutions that make one sequence the other."""
    row = list(range(len(second) + 1))
    for i, ours in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, theirs in enumerate(second, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (ours != theirs))
            diagonal, row[j] = row[j], best
    return row[-1]
