"""Prepared data, kept by a hash of what it was made from."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn

from training.errors import EnvironmentFault

MANIFEST = "manifest.json"
LARGE = 2**30
"""Bytes of a file above which its size alone is compared: reading it all would delay every run."""


def root() -> Path:
    """`ASSAY_CACHE`, else `~/.cache/assay`."""
    return Path(os.environ.get("ASSAY_CACHE") or Path.home() / ".cache" / "assay")


def digest(parts: Iterable[str | bytes]) -> str:
    """SHA-256 of the parts; where one ends matters."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def dataset_digest(dataset: Dataset) -> str:
    """SHA-256 of a dataset's rows; of a large one the fingerprint `datasets` gives it."""
    if dataset.data.nbytes > LARGE:
        return f"{dataset._fingerprint} {len(dataset)}"
    total = hashlib.sha256(str(dataset.features).encode())
    for table in dataset.with_format("arrow").iter(1000):
        for part in table.combine_chunks().to_batches():  # type: ignore[union-attr]
            total.update(part.serialize())
    return total.hexdigest()


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's state."""
    parts: list[str | bytes] = []
    for name, value in model.state_dict().items():
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts += [f"{name} {value.dtype} {tuple(value.shape)}", hashlib.sha256(raw).digest()]
    return digest(parts)


def cached(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder `<root>/<kind>/<key>`, filled by `build(folder)` if it is not there yet.

    It appears whole or not at all, so any number of processes may ask for it at once. One whose
    files are not as they were written is made again.

    Raises:
        EnvironmentFault: when it cannot be written.
    """
    final = root() / kind / key[:32]
    if _is_whole(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent))
    except OSError as error:
        raise EnvironmentFault(f"cannot write the cache {root()}: {error.strerror}") from error
    try:
        build(temporary)
        (temporary / MANIFEST).write_text(json.dumps(_contents(temporary)))
        if final.is_dir():  # damaged: nobody can use it
            with contextlib.suppress(OSError):
                final.rename(temporary / "damaged")
        try:
            temporary.rename(final)
        except OSError:
            if not _is_whole(final):  # another process was first, which is as good
                raise
    except OSError as error:
        raise EnvironmentFault(f"cannot write the cache {final}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(final / "damaged", ignore_errors=True)
    return final


def _is_whole(folder: Path) -> bool:
    try:
        return json.loads((folder / MANIFEST).read_bytes()) == _contents(folder)
    except (OSError, ValueError):
        return False


def _contents(folder: Path) -> dict[str, list[int | str]]:
    """Each file's size and, unless it is large, SHA-256."""
    found: dict[str, list[int | str]] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST):
        size = path.stat().st_size
        found[path.name] = [size]
        if size <= LARGE:
            with path.open("rb") as file:
                found[path.name].append(hashlib.file_digest(file, "sha256").hexdigest())
    return found
