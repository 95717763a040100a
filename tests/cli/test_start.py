"""What is asked for often starts fast: no torch before there is something to train."""

import statistics
import subprocess
import sys
import time

import pytest

from training.catalog import ROOT


def seconds(*code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *code], check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - started


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "limit"),
    [(["--help"], 2.0), (["list", "techniques"], 3.0), (["list", "techniques", "--json"], 3.0)],
    ids=["help", "list", "list json"],
)
def test_start_up_time(arguments, limit):
    """Median ratio to `import typer, rich` over pairs taken in turns."""
    command = f"import sys; sys.argv[1:] = {arguments}; from cli.main import main; main()"
    ratios = []
    for _ in range(15):
        base = seconds("-c", "import typer, rich")
        ratios.append(seconds("-c", command) / base)
    assert statistics.median(ratios) <= limit, sorted(ratios)


@pytest.mark.parametrize("arguments", [["--help"], ["list", "techniques"], ["run", "--help"]])
def test_without_torch(arguments):
    code = (
        f"import sys; sys.argv[1:] = {arguments}\n"
        "from cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'hydra', 'datasets', 'transformers', 'wandb', 'accelerate', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
