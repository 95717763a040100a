"""Time, peak memory and error of every implementation of every operation.

Each `kernels/<op>/bench.py` defines `cases() -> list[Case]`; this module measures them.
`python -m kernels.bench --help` lists the options.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One operation at one shape on one kind of device; `cases()` of an op's `bench.py` lists them.

    Forward and backward are measured together: the harness calls a candidate, and differentiates
    all of its outputs, each with a fixed random upstream gradient (one for scalars), with respect
    to every floating-point input that requires a gradient.

    Attributes:
        op: the operation's folder name.
        name: what distinguishes this case of the operation, e.g. `"gemma-2"`.
        device: `"cpu"` or `"cuda"`; the case is measured only there.
        dtype: of the floating-point inputs.
        shape: sizes by name, which `--shape name=value` overrides.
        inputs: `(shape, dtype, generator) -> dict of tensors`, made on the generator's device; set
            `requires_grad` on those to be differentiated.
        candidates: our implementations by name (`"reference"`, `"tiled"`, `"triton"`; the first is
            what ratios are relative to): `(**inputs) -> output or tuple of outputs`.
        peers: other implementations by name, each a function of no argument that imports the peer
            and returns a candidate; an ImportError means it is not installed.
        exact: the candidate whose result on the inputs in float64 is the truth. At a large shape a
            tiled implementation, which the tests compare with the reference.
    """

    op: str
    name: str
    device: str
    dtype: torch.dtype
    shape: dict[str, int]
    inputs: Callable[[dict[str, int], torch.dtype, torch.Generator], dict[str, Tensor]]
    candidates: dict[str, Callable[..., Outputs]]
    exact: Callable[..., Outputs]
    peers: dict[str, Callable[[], Callable[..., Outputs]]] = field(default_factory=dict)
