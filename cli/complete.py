"""Shell completion of override names and values."""

from collections.abc import Iterator
from typing import Any

import typer
import yaml

from training.configs import CONF, groups, options


def override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completions of one override, however the shell cuts it: bash makes `=` a word of its own."""
    args = list(ctx.params.get("overrides") or [])
    if incomplete in ("", "=") and args and args[-1] in groups():
        return [name.partition("=")[2] for name in overrides(f"{args[-1]}=")]
    if args[-1:] == ["="] and len(args) > 1:
        return [name.partition("=")[2] for name in overrides(f"{args[-2]}={incomplete}")]
    return overrides(incomplete)


def overrides(incomplete: str) -> list[str]:
    """Completions of a whole override: a group's configs after `group=`, keys before the `=`."""
    key, equals, value = incomplete.partition("=")
    if equals and key in groups():
        taken, bracket, last = value.rpartition("[" if "," not in value else ",")
        start = f"{key}={taken}{bracket}"
        names = options(key)
        if key == "optimizer":
            from training.libraries import library

            names = [*names, *library()]
        return [start + name for name in sorted(names) if name.startswith(last)]
    if equals:
        return []
    names = [f"{group}=" for group in groups()] + [f"{path}=" for path in _keys()]
    return [name for name in names if name.startswith(incomplete)]


def technique(incomplete: str) -> list[str]:
    """Completions of a technique's name."""
    return [name for name in options("technique") if name.startswith(incomplete)]


def decode(incomplete: str) -> list[str]:
    """Completions of the name of a way to choose the next token."""
    return [name for name in options("decode") if name.startswith(incomplete)]


def law(incomplete: str) -> list[str]:
    """Completions of a scaling law's name."""
    laws = (CONF.parent / "study" / "laws").glob("[a-z]*.py")
    return sorted(path.stem for path in laws if path.stem.startswith(incomplete))


def recipe(incomplete: str) -> list[str]:
    """Completions of a recipe's name."""
    from study.recipe import names

    return [name for name in names() if name.startswith(incomplete)]


def config(incomplete: str) -> list[str]:
    """Completions of any config's name."""
    names = {name for group in groups() for name in options(group)}
    return sorted(name for name in names if name.startswith(incomplete))


def _keys() -> Iterator[str]:
    """Keys of the default configuration."""
    root = yaml.load((CONF / "config.yaml").read_text(), Loader=yaml.CSafeLoader)
    for entry in root.pop("defaults"):
        for group, name in entry.items() if isinstance(entry, dict) else ():
            if group in groups() and isinstance(name, str):
                text = (CONF / group / f"{name}.yaml").read_text()
                root[group] = yaml.load(text, Loader=yaml.CSafeLoader) or {}
    yield from _paths(root, "")


def _paths(node: Any, prefix: str) -> Iterator[str]:
    for key, value in node.items():
        if key == "_target_":
            continue
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _paths(value, f"{path}.")
        else:
            yield path
