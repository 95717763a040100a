"""Signals at any moment."""

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.faults.runs import (
    STEPS,
    TINY,
    Child,
    Outcome,
    outcome,
    reference,
    run_folder,
    steps,
    summary,
)

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def _after_a_step(rng: random.Random, folder: Path, number: int, codes: tuple[int, ...]):
    """A signal from outside while the run trains, a random moment after a random step."""
    whole = reference(folder.parent)
    child = Child(folder, "run", *TINY, "--quiet")
    step = rng.randrange(STEPS - 2)
    ended = child.wait(lambda: steps(folder) >= step)
    if ended is None:
        time.sleep(rng.random() * 0.02)
        seen = steps(folder)
        child.signal(number)
        ended = child.end()
    else:
        seen = STEPS
    checks = [(ended.code in codes, f"ended with {ended.code}: {ended.said[-300:]}")]
    if number != signal.SIGKILL and ended.code == 130:
        kept = summary(folder).get("step", 0)
        checks.append((kept >= seen, f"stopped with step {kept} after {seen}"))
    return outcome(folder, whole, *checks)


def kill(rng: random.Random, folder: Path) -> Outcome:
    """SIGKILL at a random step."""
    return _after_a_step(rng, folder, signal.SIGKILL, (-signal.SIGKILL,))


def terminate(rng: random.Random, folder: Path) -> Outcome:
    """SIGTERM at a random step."""
    return _after_a_step(rng, folder, signal.SIGTERM, (130, -signal.SIGTERM))


def interrupt(rng: random.Random, folder: Path) -> Outcome:
    """Ctrl-C at a random step."""
    return _after_a_step(rng, folder, signal.SIGINT, (130,))


def notice(rng: random.Random, folder: Path) -> Outcome:
    """SIGTERM from a scheduler, which kills what is left after its notice: here 2 seconds."""
    whole = reference(folder.parent)
    child = Child(folder, "run", *TINY, "--quiet")
    step = rng.randrange(1, STEPS - 2)
    child.wait(lambda: steps(folder) >= step)
    seen = steps(folder)
    child.signal(signal.SIGTERM)
    end = time.monotonic() + 2
    ended = child.wait(lambda: time.monotonic() > end)
    if ended is None:
        child.signal(signal.SIGKILL)
        ended = child.end()
    kept = summary(folder).get("step", 0)
    return outcome(
        folder,
        whole,
        (ended.code == 130, f"ended with {ended.code}"),
        (kept >= seen, f"kept step {kept} of {seen}"),
    )


def in_checkpoint_kill(rng: random.Random, folder: Path) -> Outcome:
    """SIGKILL at a random operation on the files of a checkpoint."""
    return _in_checkpoint(rng, folder, signal.SIGKILL)


def in_checkpoint_terminate(rng: random.Random, folder: Path) -> Outcome:
    """SIGTERM at a random operation on the files of a checkpoint."""
    return _in_checkpoint(rng, folder, signal.SIGTERM)


def _in_checkpoint(rng: random.Random, folder: Path, number: int) -> Outcome:
    whole = reference(folder.parent)
    at = rng.randrange(operations(folder.parent))
    count = itertools.count()

    def fault() -> None:
        if next(count) == at:
            os.kill(os.getpid(), number)

    child = Child(folder, "run", *TINY, "--quiet", prepare=lambda: _at_operations(fault))
    ended = child.end()
    # A signal with the last checkpoint comes when there is nothing left to stop.
    codes = (-number,) if number == signal.SIGKILL else (130, -number, 0)
    return outcome(folder, whole, (ended.code in codes, f"ended with {ended.code}"))


def _at_operations(action: Callable[[], None]) -> None:
    """Do something at each operation of this process on a checkpoint's files."""

    def hook(event: str, arguments: tuple) -> None:
        if event in EVENTS and "checkpoints/" in str(arguments[0]):
            action()

    sys.addaudithook(hook)


@cache
def operations(work: Path) -> int:
    """How many operations a run has on files of its checkpoints."""
    note = work / "operations"

    def count() -> None:
        descriptor = os.open(note, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        _at_operations(lambda: os.write(descriptor, b"."))

    Child(work / "counted", "run", *TINY, "--quiet", prepare=count).end()
    return note.stat().st_size


def torn_line(rng: random.Random, folder: Path) -> Outcome:
    """SIGKILL after which the last lines of metrics are torn, as by a machine that lost power."""
    whole = reference(folder.parent)
    child = Child(folder, "run", *TINY, "--quiet")
    step = rng.randrange(1, STEPS - 2)
    child.wait(lambda: steps(folder) >= step)
    child.signal(signal.SIGKILL)
    child.end()
    run = run_folder(folder)
    assert run is not None
    kept = max((int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")), default=0)
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    after = b"".join(lines[kept:])  # what came before a checkpoint is on the disk with it
    path.write_bytes(b"".join(lines[:kept]) + after[: rng.randrange(len(after) + 1)])
    return outcome(folder, whole)


KINDS = {
    "SIGKILL at a step": kill,
    "SIGTERM at a step": terminate,
    "Ctrl-C at a step": interrupt,
    "SIGTERM, then SIGKILL after the notice": notice,
    "SIGKILL in a checkpoint": in_checkpoint_kill,
    "SIGTERM in a checkpoint": in_checkpoint_terminate,
    "metrics torn by a loss of power": torn_line,
}
