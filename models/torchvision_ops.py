"""Import torchvision even where its compiled operators are missing.

A torchvision built for CUDA beside a CPU build of torch cannot load its operators, and then its
import fails with "operator torchvision::nms does not exist", which takes timm and parts of
transformers with it. Neither needs the operators, only their names: those are declared here, so
that using one still fails, and importing does not. Import this module before timm or transformers.
"""

import sys

import torch

DECLARED: list[torch.library.Library] = []
"""Keeps the declarations alive: a `Library` takes them back when it is collected."""


def declare_missing_operators() -> None:
    """Import torchvision; where that fails for want of `nms`, declare `nms` and `qnms` and retry.

    Raises:
        RuntimeError: when torchvision fails for another reason.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if DECLARED or "operator torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        import torchvision  # noqa: F401


declare_missing_operators()
