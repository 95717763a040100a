"""How far what a language model writes is from what people wrote."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tasks.fetch import fetch
from training.data import move
from training.evaluate import spread
from training.sampling import Decode, continued

if TYPE_CHECKING:
    from training.run import Run


class Generation:
    """Continues validation passages from their first tokens after the last step, drawing each token
    from the model's distribution, and records of the n-grams of tokens in the continuations

    - `probe/ngram_divergence`: the Jensen-Shannon divergence, in bits, of their frequencies from
      those in the true continuations, from 0 to 1;
    - `probe/distinct`: the share of them that differ from one another;
    - `probe/repeated`: the share that was in the same continuation before.

    `probe/distinct_true` and `probe/repeated_true` are those of the true continuations.

    Args:
        decode: what is done with the next token's logits first, a component as in `conf/decode/`;
            default: nothing, tokens are drawn from the model's distribution.
        passages: evenly spaced samples of the validation set.
        prefix: tokens given.
        length: tokens to continue with.
        n: tokens in an n-gram.

    Raises:
        ValueError: for a number below 1, or a `length` below `n`; at the end, for passages that are
            shorter.
    """

    def __init__(
        self,
        passages: int = 128,
        prefix: int = 32,
        length: int = 32,
        n: int = 3,
        decode: Callable[[], Decode] | None = None,
    ) -> None:
        given = {"passages": passages, "prefix": prefix, "length": length, "n": n}
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if length < n:
            raise ValueError(f"length: must be at least n={n}, got {length}")
        self.passages, self.prefix, self.length, self.n = passages, prefix, length, n
        self.decode = decode() if decode else None

    def on_eval_end(self, run: "Run") -> None:
        """Write when training is over."""
        if run.step < run.max_steps:
            return
        # A generator of its own, so that the run's random numbers stay as they are.
        generator = torch.Generator().manual_seed(0)
        rows = fetch(run.task.validation, spread(len(run.task.validation), self.passages))
        tokens = move(run.task.prepare(rows, generator, False), run.device)["input_ids"]
        end = self.prefix + self.length
        if tokens.shape[1] < end:
            raise ValueError(f"length: passages have {tokens.shape[1]} tokens, not {end}")
        training = run.model.training
        run.model.eval()
        try:
            start = tokens[:, : self.prefix]
            said = continued(run.objective.predict, start, self.length, generator, self.decode)
        finally:
            run.model.train(training)
        ours, theirs = (ngrams(x[:, self.prefix : end], self.n) for x in (said, tokens))
        run.record(
            {
                "probe/ngram_divergence": divergence(_all(ours), _all(theirs)),
                "probe/distinct": distinct(ours),
                "probe/repeated": repeated(ours),
                "probe/distinct_true": distinct(theirs),
                "probe/repeated_true": repeated(theirs),
            }
        )


Ngram = tuple[int, ...]


def ngrams(tokens: Tensor, n: int) -> list[list[Ngram]]:
    """Those of each row of tokens (passages, length)."""
    return [[tuple(g) for g in row] for row in tokens.unfold(1, n, 1).tolist()]


def divergence(ours: Iterable[Ngram], theirs: Iterable[Ngram]) -> float:
    """Jensen-Shannon divergence of two samples' frequencies, in bits."""
    first, second = Counter(ours), Counter(theirs)
    total = 0.0
    for counts in (first, second):
        size = counts.total()
        for gram, count in counts.items():
            p = count / size
            both = (first[gram] / first.total() + second[gram] / second.total()) / 2
            total += p * math.log2(p / both) / 2
    return total


def distinct(rows: list[list[Ngram]]) -> float:
    """Different n-grams of all rows, as a share of all."""
    found = _all(rows)
    return len(set(found)) / len(found)


def repeated(rows: list[list[Ngram]]) -> float:
    """N-grams that were in their row before, as a share of all."""
    return sum(len(row) - len(set(row)) for row in rows) / sum(len(row) for row in rows)


def _all(rows: list[list[Ngram]]) -> list[Ngram]:
    return [gram for row in rows for gram in row]
