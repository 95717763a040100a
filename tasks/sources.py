"""Where datasets come from: a local path, a copy under `ASSAY_DATA`, or the Hugging Face hub."""

import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
from datasets import Dataset, DatasetDict
from huggingface_hub import constants

from training.errors import EnvironmentFault, UsageError, nearest

datasets.disable_progress_bars()

FORMATS = {
    **{".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"},
    **{".txt": "text", ".py": "text", ".md": "text", ".arrow": "arrow"},
}

DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
"""Why `datasets` could not write its own cache, or read a file."""

NO_ROWS = ("at least one example", "corresponds to no data")
"""What `datasets` says of a file without rows."""


def locate(path: str) -> Path | None:
    """The local file or folder `path` names: itself, or its copy under `ASSAY_DATA`."""
    if not path:
        return None
    data = os.environ.get("ASSAY_DATA")
    try:
        candidates = [Path(path).expanduser(), *([Path(data) / path] if data else [])]
        return next((candidate for candidate in candidates if candidate.exists()), None)
    except (OSError, RuntimeError):  # no name a file could have, or no such user
        return None


def load(path: str, name: str | None = None, known: Iterable[str] = ()) -> DatasetDict:
    """All splits of a dataset.

    Args:
        path: a file, a folder, a name under `ASSAY_DATA`, or a hub id.
        name: the configuration of a hub dataset that has several.
        known: datasets the task makes itself, to suggest one for a misspelt name.

    Raises:
        UsageError: when there is no such dataset, or it cannot be read.
        EnvironmentFault: when the disk fails.
    """
    local = locate(path)
    if local is None:
        failed = _missing(path)
        hint = nearest(path, [*_local_names(), *known])
        ask_hub(failed, hint)
        if constants.HF_HUB_OFFLINE:
            failed += ", not in the Hugging Face cache, and HF_HUB_OFFLINE is set"
        else:
            failed += ", not on the Hugging Face hub"
    else:
        failed, hint = f"task.path: cannot load '{path}'", ""
    try:
        if local is None:
            return _splits(datasets.load_dataset(path, name))
        if local.is_dir():
            return _splits(datasets.load_dataset(str(local), name))
        kind = FORMATS.get(local.suffix)
        if kind is None:
            raise UsageError(f"{failed}: its ending is none of {', '.join(FORMATS)}")
        return _splits(datasets.load_dataset(kind, data_files=str(local)))
    except UsageError:
        raise
    except Exception as error:  # each builder raises its own
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in DISK_FAULTS:
            where = cause.filename or path
            raise EnvironmentFault(f"cannot load '{path}': {where}: {cause.strerror}") from error
        if local is None and isinstance(error, OSError):  # also what is not on the hub
            raise UsageError(f"{failed}{hint}") from error
        reason = " ".join(str(cause).split())[:300]
        if any(part in reason for part in NO_ROWS):
            reason = "it has no rows"
        raise UsageError(f"task.path: cannot load '{path}': {reason}") from error


def ask_hub(missing: str, hint: str = "") -> None:
    """Find out in seconds when the hub cannot be reached: its own client retries for half a minute.

    Args:
        missing, hint: the beginning and the end of the error.

    Raises:
        UsageError: when it cannot be reached.
    """
    if constants.HF_HUB_OFFLINE or "https" in getproxies():
        return  # its client looks in its cache, or asks in a way that it knows
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=3).close()
    except OSError as error:
        raise UsageError(
            f"{missing}, and the Hugging Face hub cannot be reached (HF_HUB_OFFLINE=1 looks in its "
            f"cache){hint}"
        ) from error


def _missing(path: str) -> str:
    data = os.environ.get("ASSAY_DATA")
    where = f"no local path, not in ASSAY_DATA ({data})" if data else "no local path"
    return f"task.path: no dataset '{path}': {where}"


def _local_names() -> list[str]:
    data = os.environ.get("ASSAY_DATA")
    if not data or not Path(data).is_dir():
        return []
    return [entry.name for entry in Path(data).iterdir() if entry.is_dir()]


def split(found: DatasetDict, wanted: str, key: str, path: str) -> Dataset:
    """One split by name.

    Raises:
        UsageError: naming the nearest, when there is none of that name.
    """
    if wanted not in found:
        raise UsageError(
            f"{key}: '{path}' has no split '{wanted}'{nearest(wanted, map(str, found))}"
        )
    return found[wanted]


def held_out(found: DatasetDict, train: str, wanted: str | None, path: str) -> Dataset | None:
    """The split to validate on: `wanted`, else `validation` or `test`, if it is not `train`.

    Raises:
        UsageError: when there is no split `wanted`.
    """
    if wanted is not None:
        return split(found, wanted, "task.validation_split", path)
    names = (name for name in ("validation", "test") if name in found and name != train)
    return next((found[name] for name in names), None)


def column(dataset: Dataset, wanted: str, key: str, path: str) -> str:
    """Check that a column is there and return its name.

    Raises:
        UsageError: naming the nearest, when it is not.
    """
    if wanted not in dataset.column_names:
        hint = nearest(wanted, dataset.column_names)
        raise UsageError(f"{key}: '{path}' has no column '{wanted}'{hint}")
    return wanted


def _splits(found: object) -> DatasetDict:
    assert isinstance(found, DatasetDict)
    return found
