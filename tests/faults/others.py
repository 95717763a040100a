"""Memory, clocks, and processes beside or below a run."""

import contextlib
import os
import random
import signal
import subprocess
import time
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
    stopped,
)
from training.folder import read_config
from training.metrics import read


def out_of_memory(rng: random.Random, folder: Path) -> Outcome:
    """The allocator refuses micro-batches above a random size: they alone are halved."""
    rows = rng.choice([1, 2, 4, 8, 12])
    expected = next(n for n in (2, 4, 8, 16) if 16 // n <= rows)
    hungry = "model.activation._target_=tests.faults.components.Hungry"
    ended = Child(folder, "run", *TINY, hungry, f"+model.activation.rows={rows}", "--quiet").end()
    run = run_folder(folder)
    if ended.code or run is None:
        return Outcome(False, STEPS, ended.said[-300:])
    accumulate = read_config(run)["trainer"]["accumulate"]
    halvings = expected.bit_length() - 1
    told = ended.said.count("out of memory")
    plain = Child(
        folder / "plain", "run", *TINY, "model.activation={_target_: torch.nn.ReLU}", "--quiet"
    ).end()
    other = run_folder(folder / "plain")
    if plain.code or other is None:
        return Outcome(False, STEPS, plain.said[-300:])
    ours, theirs = (read(r / "metrics.jsonl") for r in (run, other))
    missing = abs(len(ours) - len(theirs)) + sum(
        abs(a["train/loss"] - b["train/loss"]) > 1e-4 * b["train/loss"]
        for a, b in zip(ours, theirs)
    )
    good = (accumulate, told, missing) == (expected, halvings, 0)
    return Outcome(good, missing, f"{accumulate} micro-batches of {expected}, told {told} times")


def clock(rng: random.Random, folder: Path) -> Outcome:
    """The clock jumps by up to a year, back and forth, at random moments."""
    real, state = time.time, random.Random(rng.random())
    offset = [0.0]

    def jumping() -> float:
        if state.random() < 0.1:
            offset[0] = state.uniform(-1, 1) * 365 * 86400
        return real() + offset[0]

    def prepare() -> None:
        time.time = jumping

    ended = Child(folder, "run", *TINY, "--quiet", prepare=prepare).end()
    run = run_folder(folder)
    seconds = [line["seconds"] for line in read(run / "timing.jsonl")] if run else [-1]
    sane = seconds == sorted(seconds) and seconds[0] >= 0 and seconds[-1] < 60
    return outcome(
        folder,
        reference(folder.parent),
        (ended.code == 0, ended.said[-300:]),
        (sane, f"seconds {seconds}"),
    )


def resumed_twice(rng: random.Random, folder: Path) -> Outcome:
    """Two processes resume one run; in half of the cases the first is killed before a third."""
    whole = reference(folder.parent)
    run = stopped(folder, whole, rng.choice([4, 8]))
    both = [
        Child(folder / str(i), "run", "--resume", str(run), "--trust", "--quiet") for i in range(2)
    ]
    if rng.random() < 0.5:
        before = run.stat().st_mtime_ns
        both[0].wait(lambda: run.stat().st_mtime_ns != before)
        time.sleep(rng.random() * 0.05)
        for child in both:
            child.signal(signal.SIGKILL)
        for child in both:
            child.end()
        return outcome(folder, whole)
    ended = [child.end() for child in both]
    codes = sorted(e.code for e in ended)
    refused = next((e for e in ended if e.code == 2), None)
    # One that comes when the other has ended finds the run complete.
    good = codes == [0, 0] or (codes == [0, 2] and refused is not None and refused.one_line)
    return outcome(folder, whole, (good, f"ended with {codes}: {ended[0].said[-200:]}"))


def data_worker_dies(rng: random.Random, folder: Path) -> Outcome:
    """A process that prepares batches is killed."""
    child = Child(folder, "run", *TINY, "trainer.workers=1", "--quiet")
    step = rng.randrange(STEPS - 2)
    child.wait(lambda: steps(folder) >= step)
    found = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout
    for pid in found.split():
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.kill(int(pid), signal.SIGKILL)
    ended = child.end()
    # It may have prepared every batch by then.
    good = ended.code == 0 or (ended.code == 1 and ended.one_line)
    return outcome(folder, reference(folder.parent), (good, f"{ended.code}: {ended.said[-300:]}"))


def process_dies(rng: random.Random, folder: Path) -> Outcome:
    """One of two processes of a run is killed: one line, no hang, and it goes on."""
    pair = [*TINY, "trainer.processes=2", "trainer.max_steps=40"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    child = Child(folder, "run", *pair, "--quiet", environment=environment)
    step = rng.randrange(20)
    child.wait(lambda: steps(folder) >= step)
    found = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout
    victims = found.split()
    if victims:
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.kill(int(rng.choice(victims)), signal.SIGKILL)
    killed = time.monotonic()
    ended = child.end()
    quick = time.monotonic() - killed < 30
    run = run_folder(folder)
    if ended.code != 137 or not ended.one_line or not quick or run is None:
        return Outcome(False, 0, f"{ended.code}: {ended.said[-300:]}")
    again = Child(
        folder, "run", "--resume", str(run), "--trust", "--quiet", environment=environment
    ).end()
    lines = [line["step"] for line in read(run / "metrics.jsonl")]
    missing = len(set(range(1, 41)) - set(lines))
    return Outcome(again.code == 0 and not missing, missing, again.said[-300:])


KINDS = {
    "out of memory": out_of_memory,
    "clock jumps": clock,
    "two processes resume one run": resumed_twice,
    "process that prepares batches dies": data_worker_dies,
    "process of two dies": process_dies,
}
