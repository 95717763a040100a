import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import aot

ROOT = Path(__file__).parents[2]
# Triton's interpreter replaces the kernels, so compilation happens in processes without it.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

KERNEL = """
import json, sys
import triton, triton.language as tl
from kernels.aot import AotSpec, compile_spec

@triton.jit
def product(a, b, out, size, BLOCK: tl.constexpr):
    inner = tl.arange(0, BLOCK)
    at = inner[:, None] * size + inner[None, :]
    x = tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee")
    tl.store(out + at, x)

def spec(block, warps, **change):
    signature = {"a": "*fp32", "b": "*fp32", "out": "*fp32", "size": "i32", **change}
    return AotSpec("product", product, signature, {"BLOCK": block}, num_warps=warps)
"""


def run(code: str) -> subprocess.CompletedProcess:
    # Triton reads a kernel's source from its file.
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=120,
    )


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "product.py").write_text(KERNEL)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{tmp_path}:{ROOT}")


@pytest.mark.usefixtures("module")
def test_rows_tell_small_kernels_from_spilling_ones():
    code = """
import json
from product import spec, compile_spec
from kernels.aot import TARGETS
small = [compile_spec(spec(16, 4), target) for target in TARGETS]
large = compile_spec(spec(64, 1), "cuda:80")
print(json.dumps([small, large]))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    small, large = json.loads(result.stdout.splitlines()[-1])
    assert [row["target"] for row in small] == list(aot.TARGETS)
    for row in small:
        assert 0 < row["registers"] <= 512
        assert row["spills"] == 0
        assert row["fits"]
        assert row["shared"] <= 3 * 16 * 16 * 4 * 2
    # One warp's 64 × 64 sums take 128 registers a thread, its operands 256; CUDA has 255.
    assert large["registers"] == 255
    assert large["spills"] > 0


@pytest.mark.usefixtures("module")
def test_arguments_must_be_the_kernels():
    code = "from product import *; compile_spec(spec(16, 4, extra='i32'), 'cuda:90')"
    result = run(code)
    assert "ValueError: product: missing or unknown arguments extra" in result.stderr


def test_refuses_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        aot.compile_spec(aot.AotSpec("any", None, {}), "cuda:90")


def test_unknown_names():
    with pytest.raises(ValueError, match="softmax"):
        aot.table(["softmax"])
    with pytest.raises(ValueError, match="target"):
        aot.table([], ["cuda:75"])


@pytest.mark.slow
@pytest.mark.parametrize("op", aot.ops())
def test_default_configurations_do_not_spill(op):
    """Every kernel compiles for every target, within its registers and shared memory."""
    result = subprocess.run(
        [sys.executable, "-m", "kernels.aot", op, "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])
    print(aot.format_rows(rows))
    assert {row["target"] for row in rows} == set(aot.TARGETS)
    for row in rows:
        assert row["spills"] == 0, row
        assert row["fits"], row
