"""`python -m tests.conformance [TECHNIQUE...]`: run the suite and record its matrix, of all
techniques or of those named beside what is recorded of the others."""

import json
import re
import sys
from pathlib import Path

import pytest

from training.catalog import COLUMNS, MATRIX
from training.configs import card, find, options
from training.files import write_atomically


class Recorder:
    """A pytest plugin that keeps each technique's outcome in each column."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note one test's outcome."""
        found = re.search(r"test_(\w+)\[(?:(\w+)-)?(\w+)\]", report.nodeid)
        if not found or (report.when != "call" and report.passed):
            return
        test, strategy, technique = found.groups()
        column = strategy or test
        value = "pass" if report.passed else "fail"
        if report.skipped:
            value = card(technique)["unsupported"][column]
        self.rows.setdefault(technique, {})[column] = value


def main() -> int:
    """Run, record, and return pytest's exit code."""
    recorder, wanted = Recorder(), [find(name) for name in sys.argv[1:]]
    chosen = " or ".join(f"-{name}] or [{name}]" for name in wanted)
    folder = str(Path(__file__).parent)
    which = f"not recorded and ({chosen})" if wanted else "not recorded"
    code = pytest.main([folder, "-q", "-n", "2", "-k", which], plugins=[recorder])
    if not recorder.rows:
        return int(code)
    before = json.loads(MATRIX.read_text()) if wanted else {}
    found = before | recorder.rows
    rows = {
        name: {c: found[name][c] for c in COLUMNS if c in found[name]}
        for name in options("technique")
        if name in found
    }
    write_atomically(MATRIX, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
