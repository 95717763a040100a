"""The command line, in this process."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.main import main


@dataclass
class Result:
    """What a command left."""

    code: int
    out: str
    err: str


def invoke(*arguments: str) -> Result:
    """Run `assay <arguments>` and return its exit code and output."""
    out, err = io.StringIO(), io.StringIO()
    argv, path = sys.argv, list(sys.path)
    sys.argv = ["assay", *arguments]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    finally:
        sys.argv, sys.path[:] = argv, path
    return Result(code, out.getvalue(), err.getvalue())


def lines(outputs: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of a run that is trained here."""
    result = invoke("run", *overrides, f"outputs={outputs}", "--quiet", "--json")
    assert result.code == 0, result.err
    folder = json.loads(result.out.splitlines()[-1])["run_dir"]
    text = (Path(folder) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
