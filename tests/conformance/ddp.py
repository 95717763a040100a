"""Run in two processes: every technique named trains in both, and they must agree.

Writes `{technique: "pass" or what went wrong}` to the file given first, and ends at the first
failure, after which the processes may wait for each other.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

from accelerate.utils import gather_object

from tests.conformance.runs import fitted
from training.run import Run


def check(technique: str) -> str:
    """Three steps in both processes; their weights must be the same, and new."""
    with tempfile.TemporaryDirectory() as folder:
        extra = ("trainer.max_steps=3", "trainer.processes=2")
        run, changed = fitted(technique, Path(folder), *extra)
        first, second = gather_object([_digests(run)])
        run.accelerator.wait_for_everyone()
    differing = [name for name in first if first[name] != second[name]]
    if differing:
        return f"processes differ in {', '.join(differing[:3])}"
    return "pass" if changed else "no parameter changed"


def _digests(run: Run) -> dict[str, str]:
    return {
        name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        for name, p in run.objective.named_parameters()
    }


def main() -> None:
    """Check the techniques named on the command line."""
    path, *techniques = sys.argv[1:]
    results = {}
    for technique in techniques:
        try:
            results[technique] = check(technique)
        except Exception as error:
            results[technique] = f"{type(error).__name__}: {error}"
            Path(path).write_text(json.dumps(results))
            os._exit(1)
    if os.environ["RANK"] == "0":
        Path(path).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
