"""The default task: language modelling on source code that every Python brings."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tasks.language_modeling import LanguageModeling
from tasks.sources import locate
from training.errors import UsageError

SKIPPED = frozenset({"site-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"})
"""Folders of the standard library left out: other people's packages, and tests."""


def code(
    *,
    context_length: int = 128,
    tokenizer: str = "bytes",
    vocab_size: int = 4096,
    objective: str = "causal",
    path: str | None = None,
    suffix: str = ".py",
) -> LanguageModeling:
    """Language modelling on the Python standard library's source, or on a folder of files.

    One file in twenty, by a hash of its path, is for validation. No network is needed; the text
    depends on the Python version.

    Args:
        context_length: tokens in a window.
        tokenizer: `"bytes"`, `"bpe"`, or a tokenizer's path or hub id.
        vocab_size: of a BPE.
        objective: `"causal"` or `"masked"`.
        path: a folder (default: the standard library).
        suffix: ending of the files that are read.

    Raises:
        UsageError: for a folder that is not there, or holds too little text.
    """
    folder = Path(sysconfig.get_path("stdlib")) if path is None else locate(path)
    if folder is None or not folder.is_dir():
        raise UsageError(f"task.path: no folder '{path}'")
    files = _files(folder, suffix)

    def texts(validation: bool) -> Iterator[str]:
        for file in files:
            if _is_held_out(file.relative_to(folder)) == validation:
                yield file.read_text(errors="replace")

    return LanguageModeling(
        lambda: texts(False),
        lambda: texts(True),
        source=f"{folder}/**/*{suffix}",
        context_length=context_length,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        objective=objective,
    )


def _files(folder: Path, suffix: str) -> list[Path]:
    found = folder.rglob(f"*{suffix}")
    kept = (f for f in found if not SKIPPED.intersection(f.relative_to(folder).parts[:-1]))
    return sorted(f for f in kept if f.is_file())


def _is_held_out(path: Path) -> bool:
    return hashlib.sha256(path.as_posix().encode()).digest()[0] % 20 == 0
