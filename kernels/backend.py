"""Which implementation of an operation runs."""

import functools
import importlib.util
import os

import torch

BACKENDS = ("auto", "reference", "tiled", "triton")


@functools.cache
def triton_installed() -> bool:
    """Whether the `triton` package can be imported."""
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether Triton kernels run under its interpreter (`TRITON_INTERPRET=1`), on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(backend: str, *tensors: torch.Tensor | None) -> str:
    """Resolve `backend` for these tensors to `"reference"`, `"tiled"` or `"triton"`.

    `"auto"` takes Triton when every tensor is on a GPU and the tiled path elsewhere.

    Raises:
        ValueError: for an unknown backend, tensors on different devices, or `"triton"` on a CPU
            without its interpreter.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}")
    on_gpu = bool(devices) and next(iter(devices)).type == "cuda"
    if backend == "auto":
        return "triton" if on_gpu and triton_installed() else "tiled"
    if backend == "triton":
        if not triton_installed():
            raise ValueError('backend: "triton" is not installed; use "tiled"')
        if not on_gpu and not triton_interpreted():
            raise ValueError('backend: "triton" needs a GPU or TRITON_INTERPRET=1; use "tiled"')
    return backend
