"""Objects from configuration nodes."""

import functools
import inspect
import os
import pkgutil
from collections.abc import Callable
from typing import Any

from training.errors import UsageError, nearest

KNOWN = (
    *("models.", "techniques.", "tasks.", "study.analyses.", "study.figures.", "study.probes."),
    *("training.data.", "training.objective.", "training.schedules.", "training.tracking."),
    *("study.pool.", "study.slurm.", "torch.nn.", "torch.optim."),
    *("pytorch_optimizer.optimizer.", "transformers.generation."),
)
"""Where a component of somebody else's configuration may come from."""
DISTRUST = "ASSAY_DISTRUST"
"""Set in the environment, so that processes started for a run have it too."""


def distrust() -> None:
    """From here on refuse components from elsewhere than `KNOWN`, before anything is imported."""
    os.environ[DISTRUST] = "1"


def target(node: dict[str, Any], where: str) -> Callable[..., Any]:
    """The importable object a node's `_target_` names.

    Raises:
        UsageError: when it cannot be imported, or may not.
    """
    path = node["_target_"]
    if DISTRUST in os.environ and not str(path).startswith(KNOWN):
        raise UsageError(f"{where}._target_: {_refusal(path)}")
    try:
        found = pkgutil.resolve_name(path)
    except Exception as error:  # importing runs code we did not write
        raise UsageError(f"{where}._target_: cannot import '{path}': {_reason(error)}") from error
    if not callable(found):
        raise UsageError(f"{where}._target_: '{path}' is not a class or function")
    # A module's attributes are also what it imports.
    if DISTRUST in os.environ and not f"{found.__module__}.".startswith(KNOWN):
        raise UsageError(f"{where}._target_: {_refusal(path)}")
    return found


def _refusal(path: str) -> str:
    return f"'{path}' is of none of the known packages; --trust imports it, and runs its code"


def factory(node: Any, where: str) -> Callable[..., Any]:
    """`_target_` bound to the node's other keys; components among those become factories too.

    Raises:
        UsageError: when `_target_` is missing, cannot be imported or does not take one of the keys.
    """
    if not is_component(node):
        raise UsageError(f"{where}: needs a _target_, got {node!r}")
    made = target(node, where)
    keys = {key: value for key, value in node.items() if key != "_target_"}
    _check_keys(made, keys, where)
    bound = {
        key: factory(value, f"{where}.{key}") if is_component(value) else value
        for key, value in keys.items()
    }
    return functools.partial(made, **bound) if bound else made


def component(node: dict[str, Any], where: str, offers: dict[str, Any] | None = None) -> Any:
    """What a node stands for: an instance of a class, or a function bound to its keys.

    Args:
        node, where: the node and its place in the configuration.
        offers: by name what a class is told by keyword if its constructor names it.

    Raises:
        UsageError: when it cannot be imported or built.
    """
    made = factory(node, where)
    if not inspect.isclass(getattr(made, "func", made)):
        return made
    return call(made, where, **offered(made, offers or {}))


def call(made: Callable[..., Any], where: str, *args: Any, **kwargs: Any) -> Any:
    """Call a constructor; what it refuses is the user's mistake.

    Raises:
        UsageError: for a `ValueError` or `TypeError` of the constructor, naming `where`.
    """
    try:
        return made(*args, **kwargs)
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}: {_reason(error)}") from error


def is_component(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def accepts(made: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """Parameters of a callable by name, or `None` when it takes any keyword."""
    try:
        parameters = inspect.signature(made).parameters
    except (ValueError, TypeError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return dict(parameters)


def offered(made: Callable[..., Any], offers: dict[str, Any]) -> dict[str, Any]:
    """Of what a slot offers its component by keyword, what the component names."""
    named = accepts(made) or {}
    return {name: value for name, value in offers.items() if name in named}


def _check_keys(made: Callable[..., Any], keys: dict[str, Any], where: str) -> None:
    parameters = accepts(made)
    for key in keys:
        if parameters is not None and key not in parameters:
            raise UsageError(f"{where}.{key}: no such key{nearest(key, parameters)}")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
