"""Runs in forks of this process, which has imported everything, and what is left of them."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cli.main
import cli.run
import training.train
from training.compose import compose
from training.metrics import read
from training.progress import Progress

STEPS, EVERY = 12, 4
TINY = (
    *("task=digits", "model=mlp", "model.width=16", "tracker=none", "trainer.device=cpu"),
    *("trainer.batch_size=16", f"trainer.max_steps={STEPS}", f"trainer.checkpoint_every={EVERY}"),
    *("trainer.eval_every=4", "trainer.eval_samples=32", "trainer.log_every=1"),
    "+callbacks.slow={_target_: tests.faults.components.Slow, seconds: 0.01}",
)
PATIENCE = 120.0
"""Seconds after which a process hangs."""


@dataclass
class Ended:
    """How a process ended: exit code (negative: the signal), and all it said."""

    code: int
    said: str

    @property
    def one_line(self) -> bool:
        """Whether it told one error, in a line, and no traceback."""
        return self.said.count("error: ") == 1 and "Traceback" not in self.said


@dataclass
class Outcome:
    """Whether a run survived a fault as it should, and the lines and files it lost."""

    survived: bool
    lost: int
    why: str = ""


class Child:
    """`assay <arguments>` in a fork."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        prepare: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # A pipe, as the disk may be full. It holds 64 KiB, far more than these runs say.
        self.output, writing = os.pipe()
        self.ended: Ended | None = None
        self.pid = os.fork()
        if self.pid:
            os.close(writing)
            os.set_blocking(self.output, False)
            return
        code = 1
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.chdir(folder)
            os.environ.update(environment or {})
            sys.argv = ["assay", *arguments]
            if prepare:
                prepare()
            cli.main.main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def poll(self) -> Ended | None:
        """How it ended, if it has."""
        if self.ended:
            return self.ended
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        said = b""
        with contextlib.suppress(BlockingIOError):  # a process it has started may still have it
            while part := os.read(self.output, 65536):
                said += part
        os.close(self.output)
        code = os.waitstatus_to_exitcode(status)
        self.ended = Ended(code, said.decode(errors="replace"))
        return self.ended

    def signal(self, number: int) -> None:
        """Send it a signal; nothing when its end has been seen."""
        if not self.ended:
            os.kill(self.pid, number)

    def wait(self, until: Callable[[], bool] | None = None) -> Ended | None:
        """Wait for its end, or `until` something is so; kills it when it hangs."""
        deadline = time.monotonic() + PATIENCE
        while not (until and until()):
            ended = self.poll()
            if ended:
                return ended
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return Ended(-signal.SIGKILL, "hangs")
            time.sleep(0.001)
        return None

    def end(self) -> Ended:
        """Wait for its end."""
        ended = self.wait()
        assert ended is not None
        return ended


def text_run(folder: Path, *extra: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """A run on a text, `text.txt` in a new `folder`, that caches in `cache` there: its overrides
    and environment."""
    folder.mkdir(parents=True)
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of a text that is long enough\n" for i in range(400)))
    overrides = (
        *(a for a in TINY if not a.startswith(("task=", "model"))),
        *("task=text", f"task.path={text}", "task.context_length=16", "schedule.warmup=0"),
        *("model.width=8", "model.depth=1", "model.heads=1", *extra),
    )
    return overrides, {"ASSAY_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub")}


def run_folder(folder: Path) -> Path | None:
    """The one run below `folder`, once it is there."""
    found = sorted((folder / "outputs" / "runs").glob("*/config.yaml"))
    return found[0].parent if found else None


def steps(folder: Path) -> int:
    """Steps whose metrics the run below `folder` has written."""
    run = run_folder(folder)
    return len(read(run / "metrics.jsonl")) if run else 0


def finish(folder: Path, *extra: str) -> Ended:
    """Resume the run below `folder`, or begin it where none was made."""
    run = run_folder(folder)
    if run is None:
        return Child(folder, "run", *TINY, "--quiet").end()
    return Child(folder, "run", "--resume", str(run), "--trust", "--quiet", *extra).end()


def lost(folder: Path, whole: Path) -> int:
    """Lines of metrics and last weights in which a run differs from one without a fault."""
    run = run_folder(folder)
    if run is None:
        return 1
    ours, theirs = ((r / "metrics.jsonl").read_text().splitlines() for r in (run, whole))
    differing = sum(a != b for a, b in zip(ours, theirs)) + abs(len(ours) - len(theirs))
    weights = Path("checkpoints") / f"step-{STEPS:08d}" / "model.safetensors"
    same = (run / weights).exists() and (run / weights).read_bytes() == (
        whole / weights
    ).read_bytes()
    return differing + (not same)


def outcome(folder: Path, whole: Path, *checks: tuple[bool, str], extra: tuple[str, ...] = ()):
    """Finish the run; it survived when this works, every check holds, and nothing is lost."""
    ended = finish(folder, *extra)
    missing = lost(folder, whole) if ended.code == 0 else STEPS
    failed = [what for held, what in checks if not held]
    if ended.code:
        failed.append(f"resuming ended with {ended.code}: {ended.said[-300:]}")
    elif missing:
        failed.append(f"{missing} lost")
    return Outcome(not failed, missing, "; ".join(failed))


@cache
def reference(work: Path) -> Path:
    """The run without a fault."""
    # Here, so that forks find every import done.
    training.train.start(compose([*TINY, f"outputs={work / 'warm'}"]), [*TINY], Progress())
    folder = work / "reference"
    ended = Child(folder, "run", *TINY, "--quiet").end()
    assert ended.code == 0, ended.said
    run = run_folder(folder)
    assert run is not None
    return run


def stopped(folder: Path, whole: Path, step: int) -> Path:
    """The run below `folder` as a kill after a step's checkpoint leaves it."""
    run = folder / "outputs" / "runs" / whole.name
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return run


def summary(folder: Path) -> dict:
    """The run's `summary.json`."""
    run = run_folder(folder)
    return json.loads((run / "summary.json").read_text()) if run else {}
