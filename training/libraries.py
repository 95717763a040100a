"""Optimizers of libraries by name: those of `torch.optim` and of pytorch-optimizer."""

import ast
import functools
import importlib
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.configs import options

LIBRARIES = (("torch", "torch.optim"), ("pytorch_optimizer", "pytorch_optimizer.optimizer"))
"""Package, and the module whose `__init__.py` imports the classes; the first has precedence."""

NOT_ALONE = frozenset(
    [
        # of matrices alone
        *("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon", "spectralsphere"),
        # around another optimizer
        *("bsam", "dynamiclossscaler", "friendlysam", "gsam", "lookahead", "looksam", "orthograd"),
        *("pcgrad", "rotograd", "safefp16optimizer", "sam", "schedulefreewrapper", "trac", "wsam"),
        # of a model, or with more than gradients, or with groups of another kind
        *("adalomo", "adammini", "lomo", "adahessian", "alig", "demo", "lbfgs", "lorarite"),
        *("qhadam", "sara", "sophiah", "sparseadam"),
    ]
)
"""What cannot take a step by itself: it needs more than groups of parameters with gradients."""

PLAIN = (bool, int, float, str, tuple, list, type(None))


@functools.cache
def library() -> dict[str, str]:
    """Where each is, `{"lion": "pytorch_optimizer.optimizer.Lion"}`, beside those of `conf/`.

    Read from the packages' text: importing them takes seconds, which a completion has not got.
    """
    found: dict[str, str] = {}
    for package, module in LIBRARIES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        path = Path(spec.origin).parent.joinpath(*module.split(".")[1:], "__init__.py")
        for node in ast.parse(path.read_text()).body:
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith(module)):
                continue
            for imported in node.names:
                name = imported.asname or imported.name
                if name[0].isupper() and name != "Optimizer":
                    found.setdefault(name.lower(), f"{module}.{name}")
    own = options("optimizer")
    return {n: where for n, where in sorted(found.items()) if n not in (*own, *NOT_ALONE)}


def offer(name: str) -> None:
    """Let Hydra find `optimizer=NAME`, with the arguments that have plain defaults as its keys."""
    from hydra.core.config_store import ConfigStore

    module, _, attribute = library()[name].rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
    node: dict[str, Any] = {"_target_": library()[name]}
    for key, parameter in parameters.items():
        if isinstance(parameter.default, PLAIN) and key not in ("params", "foreach"):
            default = parameter.default
            node[key] = list(default) if isinstance(default, tuple) else default
    ConfigStore.instance().store(f"{name}.yaml", node, group="optimizer", provider="assay")
