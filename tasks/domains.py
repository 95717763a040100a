"""Language modelling on several corpora, which stay apart as domains."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from tasks import losses, tokenizers
from tasks.cache import digest
from tasks.code import documents
from tasks.language_modeling import LanguageModeling
from training.errors import UsageError, nearest

COLUMN = "domain"


class Domains(LanguageModeling):
    """Predict the next token, or masked ones, of windows that each come from one domain.

    The training and validation sets are the domains' laid end to end, as the task `code` makes
    them, with one tokenizer for all and a column `domain`: which of `task.domains` a window is of.
    Batches have it as `domain` (batch,), int64. Beside the metrics of language modelling there is
    `val/loss_<domain>` for each, the mean of the task's plain loss over the domain's labels;
    `val/loss` is over all windows, so that larger domains weigh more. NaN for a domain of which
    `trainer.eval_samples` left none.

    Args:
        domains: each a folder, a file, or a package of the standard library, called by the last
            part of its path, or `{name: path}`.
        train: names of those that training sees, in the order given; default: all. Validation is
            of all.
        suffix: ending of the files that are read in folders.
        context_length, tokenizer, vocab_size, objective: as for the task `code`; a BPE is trained
            on all domains together.

    Raises:
        UsageError: without domains, for two of one name, one to train on that is not there, a path
            that is not there, or too little text in one.
    """

    def __init__(
        self,
        *,
        domains: list[str | dict[str, str]],
        train: list[str] | None = None,
        suffix: str = ".py",
        context_length: int = 128,
        tokenizer: str = "bytes",
        vocab_size: int = 4096,
        objective: str = "causal",
    ) -> None:
        paths = _named(domains)
        found = {name: documents(path, suffix, "task.domains") for name, path in paths.items()}

        def everything() -> Iterator[str]:
            return (text for texts, _, _ in found.values() for text in texts())

        shared = tokenizers.build(tokenizer, vocab_size, everything(), digest(everything()))
        parts = [
            LanguageModeling(
                texts,
                validation,
                source=f"domain '{name}', {source}",
                context_length=context_length,
                tokenizer=shared,
                vocab_size=vocab_size,
                objective=objective,
            )
            for name, (texts, validation, source) in found.items()
        ]
        self.domains = list(paths)
        self.tokenizer, self.objective, self.dims = shared, objective, parts[0].dims
        seen = [number_of(name, self, "task.train") for name in train or paths]
        self.train = concatenate_datasets([_marked(parts[i].train, i) for i in seen])
        self.validation = concatenate_datasets(
            [_marked(p.validation, i) for i, p in enumerate(parts)]
        )
        sizes = [len(part.validation) for part in parts]
        self.bytes_per_token = sum(
            size * part.bytes_per_token for size, part in zip(sizes, parts)
        ) / sum(sizes)

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`input_ids` and `labels`, both (batch, context_length), and `domain`, int64."""
        return super().prepare(rows, generator, training) | {COLUMN: rows[COLUMN].long()}

    def collect(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Each window's domain, sum of losses, and number of labels."""
        values = self.loss(outputs, batch)
        counted = losses.valid(values, batch)
        sums = (values * counted).sum(1, dtype=torch.float64)
        return {COLUMN: batch[COLUMN], "sum": sums, "count": counted.sum(1)}

    def summarise(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """The mean loss of each domain."""
        means = {}
        for number, name in enumerate(self.domains):
            own = rows[COLUMN] == number
            count = int(rows["count"][own].sum())
            means[f"loss_{name}"] = float(rows["sum"][own].sum()) / count if count else float("nan")
        return means


def number_of(name: str, task: Any, where: str) -> int:
    """Which of the task's domains a name is.

    Raises:
        UsageError: naming the nearest, when it is none, or when the task has none.
    """
    known = getattr(task, "domains", None)
    if known is None:
        raise UsageError(f"{where}: the task has no domains; task=domains has")
    if name not in known:
        raise UsageError(f"{where}: no domain '{name}'{nearest(name, known)}")
    return list(known).index(name)


def _named(domains: list[str | dict[str, str]]) -> dict[str, str]:
    """Paths by name."""
    if not domains:
        raise UsageError("task.domains: needs at least one")
    pairs = [
        pair
        for one in domains
        for pair in (one.items() if isinstance(one, dict) else [(Path(one).stem, one)])
    ]
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"task.domains: '{twice}' is named twice")
    return dict(pairs)


def _marked(dataset: Dataset, number: int) -> Dataset:
    column = np.full(len(dataset), number)
    return dataset.add_column(COLUMN, column)  # type: ignore[call-arg]
