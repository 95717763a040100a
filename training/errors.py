"""The two kinds of error a user sees as one line."""

import difflib
from collections.abc import Iterable

SHOWN = 20
"""Most valid names listed where none is near."""


class UsageError(ValueError):
    """A mistake in what was asked for; the command exits with 2."""


class EnvironmentFault(RuntimeError):
    """The machine failed us (disk, permissions, memory); the command exits with 1."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest valid name, else the valid names."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    if len(names) > SHOWN:
        return f"; valid: {', '.join(names[:SHOWN])}, ... ({len(names)} in all)"
    return f"; valid: {', '.join(names)}" if names else ""
