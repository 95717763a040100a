"""From command-line overrides to one checked configuration.

Hydra composes; what this adds is that every mistake is found before anything is built, and told in
one line with the nearest valid name.
"""

import copy
import functools
import re
from collections.abc import Iterator
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.configs import CONF, Config, find, groups, keys_set, options
from training.errors import UsageError, nearest
from training.libraries import library, offer

OWN = re.compile(r"(seed|name|outputs)=.+")
"""Overrides of one run of a study, which nothing but interpolation reads."""


def compose(overrides: list[str]) -> Config:
    """The configuration for these overrides, resolved, as plain containers.

    Adds `choices` (the config chosen in each group) and fills in `name`.

    Raises:
        UsageError: for anything wrong with the overrides.
    """
    parsed = _parse(overrides)
    chosen = _techniques(parsed)
    given = _technique_override(parsed)
    if given and chosen:  # the names of aliases
        text = f"{str(given.input_line).partition('=')[0]}=[{','.join(chosen)}]"
        overrides = [text if o == given.input_line else o for o in overrides]
        parsed = _parse(overrides)
    config = _compose(overrides)
    launched = next((o.input_line for o in parsed if _is_of_launcher(o)), None)
    if launched:
        raise UsageError(f"'{launched}': sweep and reproduce take a launcher; this run trains here")
    config.pop("launcher", None)
    for group in ("launcher", "decode"):  # neither changes what is trained
        config["choices"].pop(group, None)
    selections = [str(o.input_line) for o in parsed if _is_selection(o)]
    if chosen:
        without = [
            str(o.input_line) for o in parsed if _is_selection(o) and o.key_or_group != "technique"
        ]
        _check_slots(chosen, _shared(tuple(without)))
    _check_types(parsed, config, _shared(tuple(selections)))
    if config["name"] is None:
        choices = config["choices"]
        joined = "-".join([choices["task"], choices["model"], *config["techniques"]])
        config["name"] = joined[:100]  # the address tells apart what is cut
    if not re.fullmatch(r"[\w.+-]{1,120}", str(config["name"])):
        raise UsageError(
            f"name: letters, digits, '.', '_', '+' and '-' only, got '{config['name']}'"
        )
    return config


def compose_launcher(overrides: list[str]) -> Config:
    """The configuration whose `launcher` these overrides of it choose.

    Raises:
        UsageError: for anything wrong with them.
    """
    parsed = _parse(overrides)
    config = _compose(overrides)
    _check_types(parsed, config, _compose([o for o in overrides if o.startswith("launcher=")]))
    return config


def _is_of_launcher(override: Override) -> bool:
    return override.key_or_group.split(".")[0] == "launcher"


def _parse(overrides: list[str]) -> list[Override]:
    for override in overrides:
        if override.startswith("hydra"):
            raise UsageError(f"'{override}': Hydra's own settings have no effect here")
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        bad = next((o for o in overrides if "=" not in o and not o.startswith("~")), None)
        if bad is not None:
            raise UsageError(f"'{bad}': an override is written key=value") from error
        raise UsageError(f"override not understood: {_first_line(error)}") from error
    for override in parsed:
        if not override.key_or_group:
            raise UsageError(f"'{override.input_line}': an override is written key=value")
        if _is_selection(override) and not isinstance(override.value(), str | list | None):
            raise UsageError(f"'{override.input_line}': expected a name from conf/")
        if override.is_sweep_override():
            raise UsageError(
                f"'{override.input_line}' names several values: use `assay sweep`, "
                "or [a,b] for a list"
            )
    return parsed


def _is_selection(override: Override) -> bool:
    return override.key_or_group in groups()


def _technique_override(parsed: list[Override]) -> Override | None:
    """The last one, which is the one that counts."""
    return next((o for o in reversed(parsed) if o.key_or_group == "technique"), None)


def _techniques(parsed: list[Override]) -> list[str]:
    """The techniques asked for, checked to exist and not to collide."""
    override = _technique_override(parsed)
    value: Any = override.value() if override else None
    given = value if isinstance(value, list) else [value] if value else []
    names = [find(str(name)) for name in given]
    owners: dict[str, tuple[str, Any]] = {}
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"technique: '{name}' is named twice")
        for key, value in sorted(keys_set(name).items(), key=lambda item: item[0]):
            for taken, (owner, its) in owners.items():
                if key == taken and value == its:  # a report that both bring
                    continue
                if key == taken or key.startswith(taken + ".") or taken.startswith(key + "."):
                    raise UsageError(
                        f"technique: '{owner}' and '{name}' both set {key.lstrip('/')}; "
                        "choose one of them"
                    )
        owners |= {key: (name, value) for key, value in keys_set(name).items()}
    return names


@functools.lru_cache(maxsize=32)
def _shared(overrides: tuple[str, ...]) -> Config:
    """`_compose`, kept, as the many runs of a study begin from the same. Only to be read."""
    return _compose(list(overrides))


def _compose(overrides: list[str]) -> Config:
    own = [o for o in overrides if OWN.fullmatch(o)]
    try:
        cached, choices = _unresolved(tuple(o for o in overrides if o not in own))
        composed = copy.deepcopy(cached)
        for override in OverridesParser.create().parse_overrides(own):
            composed[str(override.key_or_group)] = override.value()
        config = OmegaConf.to_container(composed, resolve=True)
    except HydraException as error:
        raise UsageError(_explain(error, overrides)) from error
    except OmegaConfBaseException as error:
        raise UsageError(f"configuration: {_first_line(error)}") from error
    assert isinstance(config, dict)
    return {**config, "choices": dict(choices)}  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def _unresolved(overrides: tuple[str, ...]) -> tuple[DictConfig, Config]:
    """What Hydra composes, before interpolation, and the config chosen in each group. Kept, as the
    seeds of a study differ in keys of their own alone."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group == "optimizer" and override.value() in library():
            offer(str(override.value()))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra_compose("config", list(overrides), return_hydra_config=True)
    choices = {k: v for k, v in composed.hydra.runtime.choices.items() if "/" not in k}
    OmegaConf.set_readonly(composed, False)
    OmegaConf.set_struct(composed, False)
    composed.pop("hydra")
    return composed, choices


def _explain(error: Exception, overrides: list[str]) -> str:
    """One line for what Hydra refused."""
    text = str(error)
    missing = re.search(r"Could not find '([\w/]+)/([^'/]+)'", text)
    if missing:
        group, name = missing.groups()
        known = [*options(group), *(library() if group == "optimizer" else ())]
        return f"{group}: no '{name}'{nearest(name, known)[:200]}"
    unknown = re.search(r"Could not (?:override|delete)[^']*'([^']+)'", text) or re.search(
        r"Key '([^']+)' is not in struct", text
    )
    if unknown:
        key = unknown.group(1)
        selections = [o for o in overrides if o.split("=")[0].strip("+~") in groups()]
        try:
            base = _compose(selections if selections != overrides else [])
            known = [path for path, _ in _all_keys(base)]
        except (UsageError, RecursionError):
            known = []
        added = re.search(r"full_key: (\S+)", str(error.__cause__))
        if key in known and added:
            return f"{added.group(1)}: '{key}' has no such key; to add it: '+{added.group(1)}=...'"
        return f"{key}: no such key{nearest(key, known + groups())[:200]}"
    return f"configuration: {_first_line(error)}"


def _all_keys(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path, value
            yield from _all_keys(value, path)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _check_slots(techniques: list[str], base: Config) -> None:
    """Refuse a technique whose slot the chosen model does not have."""
    for name in techniques:
        for key in keys_set(name):
            part, _, slot = key.partition(".")
            if part == "model" and slot and slot.split(".")[0] not in base["model"]:
                model = base["choices"]["model"]
                slots = [k for k, v in base["model"].items() if v is None or isinstance(v, dict)]
                raise UsageError(
                    f"technique: '{name}' needs model.{slot}, which model '{model}' does not have "
                    f"(it has: {', '.join(slots) or 'no slots'})"
                )


def _check_types(parsed: list[Override], config: Config, base: Config) -> None:
    """Refuse a value whose type is not that of the default it replaces."""
    defaults, present = dict(_all_keys(base)), dict(_all_keys(config))
    for override in parsed:
        key = override.key_or_group
        if _is_selection(override) or override.is_add() or override.is_delete():
            continue
        default, value = defaults.get(key), present.get(key)
        if default is not None and value is not None and not _same_kind(value, default):
            raise UsageError(f"{key}: expected {_kind(default)} like {default!r}, got {value!r}")


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, dict):
        return isinstance(value, dict)
    if isinstance(default, list):
        return isinstance(value, list)
    return isinstance(value, type(default))


def _kind(default: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    return names.get(type(default), "keys" if isinstance(default, dict) else "a list")
