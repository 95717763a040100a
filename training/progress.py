"""What a person sees of a run while it trains."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from training.run import Run

PLAIN_SECONDS = 5.0
"""Least time between plain lines, beside those with an evaluation."""


class Progress:
    """A progress bar in a terminal, plain lines elsewhere, and every line in `log.txt`.

    Args:
        console: where to show it; `None` shows nothing.
        plain: lines even in a terminal.
    """

    def __init__(self, console: Console | None = None, plain: bool = False) -> None:
        self.console = console
        self.plain = plain or console is None or not console.is_terminal
        self._log: TextIO | None = None
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._shown = 0.0
        self._since = (0.0, 0, 0)

    def start(self, run: "Run") -> None:
        """Begin at the run's current step."""
        self._since = (time.monotonic(), run.count, run.step)
        if self.plain or not run.main:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}  {task.fields[speed]}  {task.fields[left]}"),
        )
        # Four redraws a second: more would take time from training on a small machine.
        self._bar = Bar(*columns, console=self.console, refresh_per_second=4, expand=True)
        self._task = self._bar.add_task(
            run.config["name"], total=run.max_steps, completed=run.step, loss="", speed="", left=""
        )
        self._bar.start()

    def advance(self, run: "Run") -> None:
        """Show one more finished step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=run.step)

    def timing(self, run: "Run") -> dict[str, float]:
        """Seconds trained so far, and throughput since the line before."""
        now = time.monotonic()
        then, count, step = self._since
        self._since = (now, run.count, run.step)
        elapsed = max(now - then, 1e-9)
        world = run.accelerator.num_processes
        return {
            "seconds": round(run.seconds, 3),
            f"{run.task.unit}_per_second": round((run.count - count) * world / elapsed, 1),
            "steps_per_second": round((run.step - step) / elapsed, 3),
        }

    def line(self, run: "Run", values: dict[str, float], timing: dict[str, float]) -> None:
        """Show one line of metrics."""
        if not run.main:
            return
        speed = f"{short(timing[f'{run.task.unit}_per_second'])} {run.task.unit}/s"
        left = max(run.max_steps - run.step, 0) / max(timing["steps_per_second"], 1e-9)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        # Steps after training may have trained on.
        place = f"{run.step}/{run.max_steps}" if run.step <= run.max_steps else f"{run.step}"
        text = f"step {place}  {shown}  {speed}  {clock(left)} left"
        self.log(run.folder, text)
        if self._bar is not None and "train/loss" in values:
            loss = f"loss {values['train/loss']:.4f}"
            self._bar.update(self._task, loss=loss, speed=speed, left=f"{clock(left)} left")
        evaluated = {k: v for k, v in values.items() if k.startswith(("val/", "post/"))}
        if self._bar is not None and evaluated:
            scores = "  ".join(f"{k} {v:.4f}" for k, v in evaluated.items())
            self._bar.console.print(f"step {run.step}  {scores}", highlight=False)
        if self.plain and (evaluated or time.monotonic() - self._shown > PLAIN_SECONDS):
            self._shown = time.monotonic()
            self.say(text)

    def log(self, folder: Path, text: str) -> None:
        """Append a line to the run's `log.txt`."""
        if self._log is None:
            self._log = (folder / "log.txt").open("a")
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        self._log.flush()

    def say(self, text: str) -> None:
        """Show a line of its own."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, run: "Run", text: str) -> None:
        """Show a warning, and keep it in `log.txt`."""
        if run.main:
            self.log(run.folder, f"warning: {text}")
            self.say(f"warning: {text}")

    def finish(self) -> None:
        """Take the bar away and close the log."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._log is not None:
            self._log.close()
            self._log = None


def short(number: float) -> str:
    """`12300.0` -> `"12.3k"`."""
    for unit, size in {"G": 1e9, "M": 1e6, "k": 1e3}.items():
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.1f}"


def clock(seconds: float) -> str:
    """`3725` -> `"1:02:05"`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
