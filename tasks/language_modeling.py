"""Language modelling, causal or masked, over windows cut from text."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

from tasks import losses, tokenizers
from tasks.cache import cached, digest
from training.errors import UsageError

Texts = Callable[[], Iterable[str]]
"""Gives a split's documents, each time from the first."""

GROUP = 4_000_000
"""Characters that are tokenised at once."""

MASKED_SHARE = 0.15
"""Of the tokens, in masked language modelling (BERT, arXiv 1810.04805)."""


class LanguageModeling:
    """Predict the next token, or masked ones.

    The documents are tokenised once, laid end to end and cut into windows of `context_length`
    tokens and the next one; the windows are cached by a hash of their text and memory-mapped.

    Args:
        train, validation: documents. Without `validation` the last tenth of the training windows
            is held out.
        source: what the text is called in an error.
        context_length: tokens in a window.
        tokenizer: `"bytes"`, `"bpe"`, a tokenizer's path or hub id, or one of `tasks.tokenizers`.
        vocab_size: of a BPE that is trained here.
        objective: `"causal"`, or `"masked"`: of 15% of the tokens, 80% become the mask token, 10%
            a random one and 10% stay, and these alone are predicted.

    Raises:
        UsageError: when there is too little text for one window of each split.
    """

    unit = "tokens"

    def __init__(
        self,
        train: Texts,
        validation: Texts | None,
        *,
        source: str,
        context_length: int,
        tokenizer: str | tokenizers.Bytes | tokenizers.Subwords,
        vocab_size: int,
        objective: str,
    ) -> None:
        if context_length < 1:
            raise UsageError(f"task.context_length: must be at least 1, got {context_length}")
        if objective not in ("causal", "masked"):
            raise UsageError(f"task.objective: 'causal' or 'masked', got '{objective}'")
        content = digest(train())
        if isinstance(tokenizer, str):
            tokenizer = tokenizers.build(tokenizer, vocab_size, train(), content)
        self.tokenizer = tokenizer
        self.objective = objective
        self.train, about = _windows(train, content, self.tokenizer, context_length)
        if validation is None:
            _check(about["tokens"], 3, context_length, source)
            self._hold_out()
        else:
            _check(about["tokens"], 1, context_length, f"{source} (training)")
            split = _windows(validation, digest(validation()), self.tokenizer, context_length)
            self.validation, about = split
            _check(about["tokens"], 1, context_length, f"{source} (validation)")
        self.bytes_per_token = about["bytes"] / about["tokens"]
        masks = objective == "masked"
        size = self.tokenizer.vocab_size
        self.dims = {
            "vocab_size": max(size, self.tokenizer.mask_token + 1) if masks else size,
            "context_length": context_length,
        }

    def count(self, batch: dict[str, Any]) -> int:
        """Tokens in a batch."""
        return batch["input_ids"].numel()

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`input_ids` and `labels`, both (batch, context_length), int64."""
        tokens = rows["tokens"].long()
        if self.objective == "masked":
            return self._mask(tokens[:, :-1].contiguous(), generator)
        return {
            "input_ids": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
        }

    def _mask(self, tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
        chosen = torch.rand(tokens.shape, generator=generator) < MASKED_SHARE
        fate = torch.rand(tokens.shape, generator=generator)
        noise = torch.randint(self.tokenizer.vocab_size, tokens.shape, generator=generator)
        inputs = tokens.where(~(chosen & (fate < 0.8)), torch.tensor(self.tokenizer.mask_token))
        inputs = inputs.where(~(chosen & (fate >= 0.9)), noise)
        labels = tokens.where(chosen, torch.tensor(losses.IGNORED))
        return {"input_ids": inputs, "labels": labels}

    loss = staticmethod(losses.cross_entropy)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Whether each token was predicted."""
        return {"accuracy": losses.correct(outputs, batch)}

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Perplexity per token; for a causal model also bits per byte of the text."""
        found = {"perplexity": math.exp(min(means["loss"], 700.0))}
        if self.objective == "causal":
            found["bits_per_byte"] = means["loss"] / math.log(2) / self.bytes_per_token
        return found

    def _hold_out(self) -> None:
        windows = len(self.train)
        held = max(windows // 10, 1)
        self.validation = self.train.select(range(windows - held, windows))
        # One window between the two is left out: neighbours share a token.
        self.train = self.train.select(range(windows - held - 1))


def _check(tokens: int, windows: int, context_length: int, source: str) -> None:
    needed = windows * context_length + 1
    if tokens < needed:
        raise UsageError(
            f"task: too little text in {source}: {tokens} tokens found, {needed} needed; give it "
            "more, or a smaller task.context_length"
        )


def _windows(
    texts: Texts, content: str, tokenizer: Any, context_length: int
) -> tuple[Dataset, dict[str, int]]:
    """The windows as a memory-mapped dataset with the column `tokens`, and how many `tokens` and
    `bytes` the text has."""

    def write(folder: Path) -> None:
        kind = tokenizers.smallest_dtype(tokenizer.vocab_size)
        list_type = pa.list_(pa.from_numpy_dtype(kind), context_length + 1)
        schema = pa.schema({"tokens": list_type})
        tokens = size = 0
        with pa.ipc.new_stream(str(folder / "windows.arrow"), schema) as writer:
            left = np.empty(0, dtype=kind)
            for documents in _groups(texts()):
                encoded = tokenizer.encode(documents)
                tokens += sum(len(ids) for ids in encoded)
                size += sum(len(text.encode()) for text in documents)
                left = np.concatenate([left, *encoded]).astype(kind, copy=False)
                count = max(len(left) - 1, 0) // context_length
                if not count:
                    continue
                starts = np.arange(count)[:, None] * context_length
                rows = left[starts + np.arange(context_length + 1)]
                values = pa.array(rows.reshape(-1))
                array = pa.FixedSizeListArray.from_arrays(values, context_length + 1)
                writer.write_batch(pa.record_batch([array], schema=schema))
                left = left[count * context_length :]
        about = {"tokens": tokens, "bytes": size}
        (folder / "about.json").write_text(json.dumps(about))

    key = digest(["windows-1", content, tokenizer.identity, str(context_length)])
    folder = cached("windows", key, write)
    about = json.loads((folder / "about.json").read_text())
    return Dataset.from_file(str(folder / "windows.arrow")), about


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
