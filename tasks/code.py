"""The default task: language modelling on source code that every Python brings."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tasks.language_modeling import LanguageModeling, Texts
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

    One file in twenty, by a hash of its path, is for validation; of so few files that none is, the
    last tenth of the text. No network is needed; the text depends on the Python version.

    Args:
        context_length: tokens in a window.
        tokenizer: `"bytes"`, `"bpe"`, or a tokenizer's path or hub id.
        vocab_size: of a BPE.
        objective: `"causal"` or `"masked"`.
        path: a folder, of which tests and other people's packages are left out, or a file; or the
            name of a package of the standard library, such as `"asyncio"` (default: all of it).
        suffix: ending of the files that are read.

    Raises:
        UsageError: for a path that is not there, or holds too little text.
    """
    train, validation, source = documents(path, suffix)
    return LanguageModeling(
        train,
        validation,
        source=source,
        context_length=context_length,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        objective=objective,
    )


def documents(
    path: str | None, suffix: str, key: str = "task.path"
) -> tuple[Texts, Texts | None, str]:
    """Files to train on, files held out, and what they are called together.

    Args:
        path, suffix: as for `code`.
        key: the configuration key an error names.

    Raises:
        UsageError: for a path that is not there.
    """
    library = Path(sysconfig.get_path("stdlib"))
    place = library if path is None else locate(path)
    if place is None and path and (library / path).is_dir():
        place = library / path
    if place is None:
        raise UsageError(f"{key}: no file or folder '{path}'")
    files = [place] if place.is_file() else _files(place, suffix)
    held_out = [file for file in files if _is_held_out(file.relative_to(place))]
    train = [file for file in files if file not in held_out]
    if not held_out or not train:
        train, held_out = files, []
    source = str(place) if place.is_file() else f"{place}/**/*{suffix}"
    return lambda: _texts(train), (lambda: _texts(held_out)) if held_out else None, source


def _files(folder: Path, suffix: str) -> list[Path]:
    found = folder.rglob(f"*{suffix}")
    kept = (f for f in found if not SKIPPED.intersection(f.relative_to(folder).parts[:-1]))
    return sorted(f for f in kept if f.is_file())


def _texts(files: list[Path]) -> Iterator[str]:
    return (file.read_text(encoding="utf-8", errors="replace") for file in files)


def _is_held_out(path: Path) -> bool:
    return hashlib.sha256(path.as_posix().encode()).digest()[0] % 20 == 0
