"""`assay new`."""

import re
from enum import StrEnum
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from cli.output import console

app = typer.Typer(help="Begin something new.", no_args_is_help=True, rich_markup_mode=None)

TEMPLATES = Path(__file__).parent / "templates"


class Slot(StrEnum):
    """The slots a technique can be begun for."""

    activation = "activation"
    norm = "norm"
    attention = "attention"
    ffn = "ffn"
    position = "position"
    init = "init"
    reparam = "reparam"
    loss = "loss"
    weighting = "weighting"
    penalty = "penalty"
    gradient = "gradient"
    optimizer = "optimizer"
    callback = "callback"


KEYS = {
    **{slot: f"model.{slot}" for slot in ("activation", "norm", "attention", "ffn", "position")},
    **{"loss": "task.loss", "penalty": "penalties", "callback": "callbacks"},
}
"""Configuration key of each slot where it is not the slot's own name."""

FUNCTIONS = ("init", "reparam", "weighting", "penalty")
"""Slots whose component is a function of the technique's name; the others' is a class."""


@app.command("technique")
def technique(
    name: Annotated[str, typer.Argument(help="In snake_case, as in `technique=<name>`.")],
    slot: Annotated[Slot, typer.Option(help="Where in a run it goes.")],
    arxiv: Annotated[str, typer.Option(help="The paper's arXiv id.")] = "0000.00000",
) -> None:
    """Write code, overlay, test and recipe of a new technique, which pass as they are."""
    from training.configs import CONF, options
    from training.errors import UsageError

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"'{name}': a technique's name is in snake_case, like entropy_attention")
    if name in options("technique"):
        raise UsageError(f"technique '{name}' exists already")
    root = CONF.parent
    files = _files(name, slot.value, arxiv)
    for path in files:
        if (root / path).exists():
            raise UsageError(f"{path} exists already")
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    out = console()
    for path in files:
        out.print(path, highlight=False)
    tests = f"pytest tests/techniques/test_{name}.py tests/conformance -k {name}"
    out.print(f"try it: assay run technique={name}, and {tests}", highlight=False, soft_wrap=True)


def _files(name: str, slot: str, arxiv: str) -> dict[str, str]:
    """Contents by path."""
    words = {
        "name": name,
        "class_name": "".join(part.capitalize() for part in name.split("_")),
        "title": name.replace("_", " "),
        "arxiv": arxiv,
    }
    code, test = (
        Template((TEMPLATES / slot / f"{kind}.py.tmpl").read_text()).substitute(words)
        for kind in ("technique", "test")
    )
    files = {
        f"techniques/{slot}/{name}.py": code,
        f"conf/technique/{name}.yaml": _overlay(name, slot, words),
        f"tests/techniques/test_{name}.py": test,
        f"recipes/{name}.yaml": Template((TEMPLATES / "recipe.yaml.tmpl").read_text()).substitute(
            words
        ),
    }
    if slot == "optimizer":
        target = f"techniques.optimizer.{name}.{words['class_name']}"
        files[f"conf/optimizer/{name}.yaml"] = f"_target_: {target}\nlr: 1e-3\n"
    return files


def _overlay(name: str, slot: str, words: dict[str, str]) -> str:
    made = name if slot in FUNCTIONS else words["class_name"]
    target = f"_target_: techniques.{slot}.{name}.{made}"
    key = KEYS.get(slot, slot)
    head = {
        "optimizer": f"defaults:\n  - override /optimizer: {name}\n",
        "penalty": f"penalties:\n  {name}: {{{target}, coefficient: 1e-4}}\n",
        "gradient": f"gradient: {{{target}}}\n",
        "weighting": f"weighting: {{{target}}}\n",
    }.get(slot)
    if head is None and "." in key:
        part, leaf = key.split(".")
        head = f"{part}:\n  {leaf}: {{{target}}}\n"
    elif head is None:
        head = f"{key}:\n  {name}: {{{target}}}\n"
    card = Template((TEMPLATES / "card.yaml.tmpl").read_text())
    return f"# @package _global_\n{head}\n{card.substitute(words, slot=key)}"
