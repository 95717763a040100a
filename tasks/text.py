"""Language modelling on any text."""

from collections.abc import Iterator

from datasets import Dataset

from tasks import sources
from tasks.language_modeling import LanguageModeling
from training.errors import UsageError


def text(
    *,
    path: str | None,
    name: str | None = None,
    column: str = "text",
    train_split: str = "train",
    validation_split: str | None = None,
    context_length: int = 128,
    tokenizer: str = "bytes",
    vocab_size: int = 4096,
    objective: str = "causal",
) -> LanguageModeling:
    """Language modelling on a Hugging Face text dataset or on local text files.

    Args:
        path: a text, CSV, JSON-lines or Parquet file or a folder of them, a name under
            `ASSAY_DATA`, or a hub id.
        name: the configuration of a hub dataset that has several.
        column: which holds the text.
        train_split, validation_split: names of the splits. Without the second it is `validation`
            or else `test`, and where there is neither the last tenth of the first is held out.
        context_length, tokenizer, vocab_size, objective: as for the task `code`.

    Raises:
        UsageError: for a dataset, split or column that is not there, or too little text.
    """
    if path is None:
        raise UsageError("task.path: which text? a file, a folder or a hub id, as task.path=...")
    found = sources.load(path, name)
    train = sources.split(found, train_split, "task.train_split", path)
    sources.column(train, column, "task.column", path)
    held_out = sources.held_out(found, train_split, validation_split, path)
    return LanguageModeling(
        lambda: _documents(train, column),
        None if held_out is None else lambda: _documents(held_out, column),
        source=path,
        context_length=context_length,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        objective=objective,
    )


def _documents(dataset: Dataset, column: str) -> Iterator[str]:
    """The rows' texts, a newline after each: `datasets` takes files line by line without it."""
    lines: list[str] = []
    size = 0
    for rows in dataset.select_columns(column).iter(1000):
        for line in rows[column]:  # type: ignore[index]
            lines.append(f"{line or ''}\n")
            size += len(lines[-1])
        if size > 1_000_000:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)
