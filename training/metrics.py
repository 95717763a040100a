"""A run's metrics as JSON lines."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from training.errors import EnvironmentFault
from training.files import write_atomically


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file, a torn last one left out; `[]` without a file."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class MetricsFile:
    """Appends to `metrics.jsonl`, one object a line, each line written whole.

    What the run computes goes to `metrics.jsonl`, which is equal byte for byte however often the
    run was interrupted; what the clock says goes to `timing.jsonl` beside it.

    Args:
        folder: the run's folder.
        enabled: false in processes that write nothing.
    """

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self.path, self.timing_path = folder / "metrics.jsonl", folder / "timing.jsonl"
        self.enabled = enabled
        self._files: dict[Path, TextIO] = {}

    def rewind(self, step: int) -> None:
        """Drop what was written after `step` or of `post`, as a resumed run will write it again."""
        if not self.enabled:
            return
        self.close()
        for path in (self.path, self.timing_path):
            kept = [line for line in read(path) if line["step"] <= step and not _of_post(line)]
            write_atomically(path, "".join(json.dumps(finite(line)) + "\n" for line in kept))

    def write(self, values: dict[str, Any], timing: dict[str, Any]) -> None:
        """Append one line to each file."""
        if self.enabled:
            self._append(self.path, values)
            self._append(self.timing_path, timing)

    def _append(self, path: Path, values: dict[str, Any]) -> None:
        try:
            if path not in self._files:
                self._files[path] = path.open("a")
            self._files[path].write(json.dumps(finite(values)) + "\n")
            self._files[path].flush()
        except OSError as error:
            raise EnvironmentFault(f"cannot write {path}: {error.strerror}") from error

    def sync(self) -> None:
        """See what is written on the disk, so that no checkpoint is ahead of it."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk was already told when writing
                file.close()
        self._files.clear()


def _of_post(line: dict[str, Any]) -> bool:
    return any(key.startswith("post/") for key in line)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with NaN and infinities as strings, for which JSON has no number."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
