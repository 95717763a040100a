"""Several processes of one run on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

GRACE_SECONDS = 60.0
"""How long the others may take to end after the first process has failed."""


def inside() -> bool:
    """Whether this process is already one of several (ours, `accelerate launch`, `torchrun`)."""
    return "WORLD_SIZE" in os.environ


def main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def launch(arguments: list[str], processes: int) -> int:
    """Run `assay <arguments>` in so many processes and return the exit code.

    When one of them fails the others are ended, and its exit code is returned. Signals are passed
    on; each process stops by itself at the same step.
    """
    root = str(Path(__file__).parent.parent)
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    # Torch would start as many threads in each process as there are cores.
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-P", "-m", "cli", *arguments]
    children = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    passed_on = {s: signal.signal(s, _pass_on(children)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(children)
    finally:
        for child in children:
            child.kill()
        for number, handler in passed_on.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    failed, deadline = 0, float("inf")
    while any(child.poll() is None for child in children):
        codes = [child.returncode for child in children if child.returncode]
        if codes and not failed:
            failed, deadline = codes[0], time.monotonic() + GRACE_SECONDS
            if failed != 130:  # after an interrupt all of them are ending by themselves
                deadline = time.monotonic() + 5
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [child.returncode for child in children if child.returncode]
    code = failed or (codes[0] if codes else 0)
    return code if code >= 0 else 128 - code


def _pass_on(children: list[subprocess.Popen[bytes]]):
    def handler(number: int, frame: object) -> None:
        for child in children:
            # A terminal's Ctrl-C reaches the whole group; a second one would kill the child.
            if number != signal.SIGINT or not sys.stdin.isatty():
                child.send_signal(number)

    return handler


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
