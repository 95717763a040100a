"""Where datasets come from: a local path, a copy under `ASSAY_DATA`, or the Hugging Face hub."""

import os
import socket
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict

from training.errors import EnvironmentFault, UsageError, nearest

datasets.disable_progress_bars()

FORMATS = {
    **{".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"},
    **{".txt": "text", ".py": "text", ".md": "text", ".arrow": "arrow"},
}


def locate(path: str) -> Path | None:
    """The local file or folder `path` names: itself, or its copy under `ASSAY_DATA`."""
    candidates = [Path(path).expanduser()]
    if os.environ.get("ASSAY_DATA"):
        candidates.append(Path(os.environ["ASSAY_DATA"]) / path)
    return next((candidate for candidate in candidates if candidate.exists()), None)


def load(path: str, name: str | None = None, kind: str | None = None) -> DatasetDict:
    """All splits of a dataset.

    Args:
        path: a file, a folder, a name under `ASSAY_DATA`, or a hub id.
        name: the configuration of a hub dataset that has several.
        kind: the `datasets` builder for local files (`"text"`, `"csv"`, ...); found by the files'
            endings otherwise.

    Raises:
        UsageError: when there is no such dataset, or it cannot be read.
        EnvironmentFault: when the hub cannot be reached.
    """
    local = locate(path)
    try:
        if local is None:
            require_hub(path)
            return _splits(datasets.load_dataset(path, name))
        if local.is_dir():
            if kind is None:
                return _splits(datasets.load_dataset(str(local)))
            return _splits(datasets.load_dataset(kind, data_dir=str(local)))
        kind = kind or FORMATS.get(local.suffix)
        if kind is None:
            known = ", ".join(FORMATS)
            raise UsageError(f"task.path: cannot read {local}: its ending is none of {known}")
        return _splits(datasets.load_dataset(kind, data_files=str(local)))
    except (UsageError, EnvironmentFault):
        raise
    except Exception as error:  # each builder raises its own
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UsageError(f"task.path: cannot load '{path}': {reason}") from error


def require_hub(path: str) -> None:
    """Say that `path` is nowhere here, unless the hub may have it.

    The hub's own client retries for most of a minute without a network; this asks once.

    Raises:
        UsageError: when `path` cannot be a hub id, or the hub may not or cannot be asked.
    """
    data = os.environ.get("ASSAY_DATA")
    local = sorted(p.name for p in Path(data).iterdir()) if data and Path(data).is_dir() else []
    where = f"not a local path, not in ASSAY_DATA ({data})" if data else "not a local path"
    missing = f"task.path: no dataset '{path}': {where}"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise UsageError(f"{missing}, and HF_HUB_OFFLINE is set{nearest(path, local)}")
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError as error:
        if os.environ.get("HF_ENDPOINT") or os.environ.get("HTTPS_PROXY"):
            return  # reached another way, which its client knows
        raise UsageError(
            f"{missing}, and the Hugging Face hub cannot be reached{nearest(path, local)}"
        ) from error


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
