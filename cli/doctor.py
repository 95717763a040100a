"""`assay doctor`."""

from typing import Any

from cli.output import Json, console, print_json


def doctor(json: Json = False) -> None:
    """Say what this machine has: versions, devices, kernel backends, W&B, data."""
    report = {
        "versions": _versions(),
        "devices": _devices(),
        "kernels": _kernels(),
        "wandb": _wandb(),
        "data": _data(),
        "outputs": _outputs(),
    }
    if json:
        print_json(report)
        return
    out = console()
    for section, entries in report.items():
        out.print(section, style="bold")
        for key, value in entries.items():
            out.print(f"  {key}: {value}", highlight=False, markup=False, soft_wrap=True)


def _versions() -> dict[str, Any]:
    import platform

    from training.environment import versions

    return {"python": platform.python_version(), **versions()}


def _devices() -> dict[str, Any]:
    import os

    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    named = [f"{g.name}, {g.total_memory / 2**30:.0f} GiB, sm_{g.major}{g.minor}" for g in gpus]
    return {
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": named or "none",
        "bf16 on the GPU": torch.cuda.is_bf16_supported() if gpus else None,
    }


def _kernels() -> dict[str, Any]:
    """Which backend the operations in `kernels/` take here."""
    import torch

    from kernels.backend import choose, triton_installed, triton_interpreted

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "triton installed": triton_installed(),
        "triton interpreted": triton_interpreted(),
        "backend taken": choose("auto", torch.zeros(1, device=device)),
    }


def _wandb() -> dict[str, Any]:
    from training.tracking import mode

    state = mode()
    return {
        "mode": state,
        "why": "logged in" if state == "online" else "WANDB_MODE, or no login found",
    }


def _data() -> dict[str, Any]:
    import os
    from pathlib import Path

    folder = os.environ.get("ASSAY_DATA")
    if not folder:
        return {"ASSAY_DATA": "not set: datasets come from the Hugging Face hub"}
    path = Path(folder)
    if not path.is_dir():
        return {"ASSAY_DATA": f"{folder} (no such folder)"}
    names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    return {"ASSAY_DATA": folder, "found": ", ".join(names) or "nothing"}


def _outputs() -> dict[str, Any]:
    import os
    import shutil
    from pathlib import Path

    folder = Path("outputs")
    parent = folder if folder.is_dir() else Path()
    free = shutil.disk_usage(parent).free / 2**30
    writable = "writable" if os.access(parent, os.W_OK) else "not writable"
    return {"folder": f"{folder.resolve()} ({writable}, {free:.0f} GiB free)"}
