"""Compile the Triton kernels for machines that are not here, and list what each kernel costs there.

`python -m kernels.aot` prints one row per kernel and target: registers per thread, shared memory
per block and spills in bytes. Every `kernels/<op>/triton.py` takes part by defining `aot_specs()`.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
# Most dynamic shared memory (LDS) one block may have, in bytes: CUDA programming guide (technical
# specifications per compute capability), CDNA 3 instruction set reference.
SHARED_LIMIT = {
    "cuda:80": 163 * 1024,
    "cuda:90": 227 * 1024,
    "cuda:100": 227 * 1024,
    "hip:gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class AotSpec:
    """One kernel in one configuration, as `aot_specs()` of an op's `triton.py` lists it.

    Attributes:
        name: what the table calls it, e.g. `"linear_cross_entropy/lse bf16"`.
        kernel: the `@triton.jit` function (of an autotuned kernel, the function it wraps).
        signature: type of every argument that is not a constexpr, by name: `"*bf16"`, `"*i64"`,
            `"i32"`, `"fp32"`...
        constexprs: value of every other argument, by name. An optional pointer that is left out is
            a constexpr `None`.
        num_warps, num_stages: the launch's.
        divisible: names of the integer arguments (sizes, strides) that are multiples of 16 at the
            usual shapes; pointers always are. Triton vectorises loads when it knows.
        targets: where this configuration is the default one.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = ()
    targets: tuple[str, ...] = TARGETS


def ops() -> list[str]:
    """Names of the operations that have a Triton implementation."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton.py"))


def compile_spec(spec: AotSpec, target: str) -> dict[str, Any]:
    """Compile one kernel for one of `TARGETS`; its row of the table.

    Returns:
        `kernel`, `target`, `registers` (per thread), `shared` (bytes per block), `spills` (bytes
        per thread on CUDA, registers on AMD) and `fits` (whether `shared` is within the target's
        limit).

    Raises:
        ValueError: when the signature and constexprs do not name the kernel's arguments exactly, or
            under Triton's interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET: must be unset to compile kernels")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = spec.kernel
    while not hasattr(kernel, "arg_names") or not hasattr(kernel, "cache_key"):
        kernel = kernel.fn  # inside an autotuner or heuristics
    given = {**spec.signature, **dict.fromkeys(spec.constexprs, "constexpr")}
    if set(given) != set(kernel.arg_names):
        wrong = sorted(set(given) ^ set(kernel.arg_names))
        raise ValueError(f"{spec.name}: missing or unknown arguments {', '.join(wrong)}")
    signature = {name: given[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in spec.divisible
    }
    vendor, arch = target.split(":")
    gpu = GPUTarget("cuda", int(arch), 32) if vendor == "cuda" else GPUTarget("hip", arch, 64)
    source = ASTSource(kernel, signature, constexprs=spec.constexprs, attrs=aligned)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=gpu, options=options)
    usage = _usage_cuda if vendor == "cuda" else _usage_hip
    registers, spills = usage(compiled, arch)
    shared = compiled.metadata.shared
    return {
        "kernel": spec.name,
        "target": target,
        "registers": registers,
        "shared": shared,
        "spills": spills,
        "fits": shared <= SHARED_LIMIT[target],
    }


def _usage_cuda(compiled: Any, arch: str) -> tuple[int, int]:
    """Registers and spilled bytes, as the assembler reports them for the compiled PTX."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        command = [
            get_ptxas(int(arch)).path,
            "-v",
            f"--gpu-name={sm_arch_from_capability(int(arch))}",
            str(source),
            "-o",
            str(source.with_suffix(".cubin")),
        ]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    return registers, spills


def _usage_hip(compiled: Any, arch: str) -> tuple[int, int]:
    """Vector registers (architectural and accumulation) and spilled ones, from the metadata."""
    del arch
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s*(\d+)", text)
        if match is None:
            raise RuntimeError(f"no {key} in the AMD metadata")
        return int(match.group(1))

    return number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count")


def table(names: Sequence[str] | None = None, targets: Sequence[str] = TARGETS) -> list[dict]:
    """Rows of `compile_spec` for the operations `names` (all of them by default).

    Raises:
        ValueError: for an operation or a target that does not exist.
    """
    for name in names or ():
        if name not in ops():
            raise ValueError(f"op: {name!r} has no Triton kernels; expected one of {ops()}")
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    return [
        compile_spec(spec, target)
        for name in (ops() if names is None else names)
        for spec in importlib.import_module(f"kernels.{name}.triton").aot_specs()
        for target in targets
        if target in spec.targets
    ]


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `table` as text."""
    width = max((len(row["kernel"]) for row in rows), default=6)
    lines = [f"{'kernel':{width}} {'target':12} {'registers':>9} {'shared':>8} {'spills':>6}"]
    for row in rows:
        note = "" if row["fits"] else "  more shared memory than the target has"
        lines.append(
            f"{row['kernel']:{width}} {row['target']:12} {row['registers']:9} {row['shared']:8} "
            f"{row['spills']:6}{note}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m kernels.aot [OP ...] [--target T ...] [--json]`; 1 when a kernel spills."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__)
    parser.add_argument("ops", nargs="*", help="operations (default: all)")
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        # The interpreter replaces every kernel when Triton is imported: start over without it.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "kernels.aot", *(arguments or sys.argv[1:])]
        return subprocess.run(command, env=environment, check=False).returncode
    try:
        rows = table(options.ops or None, options.target or TARGETS)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(rows))
    else:
        print(format_rows(rows))
    return 1 if any(row["spills"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
