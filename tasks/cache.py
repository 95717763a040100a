"""Prepared data, kept by a hash of what it was made from."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from training.errors import EnvironmentFault


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


def cached(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder `<root>/<kind>/<key>`, filled by `build(folder)` if it is not there yet.

    It appears whole or not at all, so any number of processes may ask for it at once.

    Raises:
        EnvironmentFault: when it cannot be written.
    """
    final = root() / kind / key[:32]
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent))
    except OSError as error:
        raise EnvironmentFault(f"cannot write the cache {root()}: {error.strerror}") from error
    try:
        build(temporary)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # another process was first, which is as good
                raise
    except OSError as error:
        raise EnvironmentFault(f"cannot write the cache {final}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final
