"""`assay list`."""

import shutil
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from cli.output import Json, print_json


class Kind(StrEnum):
    """What can be listed."""

    techniques = "techniques"
    tasks = "tasks"
    models = "models"
    optimizers = "optimizers"
    schedules = "schedules"


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")] = Kind.techniques,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Techniques against the conformance suite's columns.")
    ] = False,
    json: Json = False,
) -> None:
    """List what a run can be made of."""
    if kind is Kind.techniques and matrix:
        _matrix(json)
    elif kind is Kind.techniques:
        _techniques(json)
    else:
        _configs(kind.value.removesuffix("s"), json)


def _techniques(json: bool) -> None:
    from training.catalog import entry
    from training.configs import options

    rows = [entry(name) for name in options("technique")]
    if json:
        print_json(rows)
        return
    rows.sort(key=lambda row: (row["slot"], row["name"]))
    columns = ("name", "slot", "status", "verdict", "arxiv", "paper")
    _table(columns, [[row[c] or "" for c in columns] for row in rows])


def _matrix(json: bool) -> None:
    from training.catalog import COLUMNS, matrix
    from training.configs import options

    recorded = matrix()
    rows = {name: recorded.get(name, {}) for name in options("technique")}
    if json:
        print_json(rows)
        return
    marks = {"pass": "✓", "fail": "✗", None: "?"}
    reasons: list[str] = []
    cells = []
    for name, row in rows.items():
        line = [name]
        for column in COLUMNS:
            value = row.get(column)
            if value not in marks:
                reasons.append(f"{name}, {column}: {value}")
            line.append(marks.get(value, f"({len(reasons)})"))
        cells.append(line)
    _table(("technique", *COLUMNS), cells)
    for number, reason in enumerate(reasons, 1):
        print(f"({number}) {reason}")


def _configs(group: str, json: bool) -> None:
    import yaml

    from training.configs import CONF, options
    from training.libraries import library

    rows = []
    for name in options(group):
        text = (CONF / group / f"{name}.yaml").read_text()
        node: dict[str, Any] = yaml.load(text, Loader=yaml.CSafeLoader) or {}
        node = node.get(group, node)
        rows.append(
            {"name": name, "target": node.get("_target_", ""), "about": _first_comment(text)}
        )
    if group == "optimizer":
        about = "a library's, with its own defaults"
        rows += [{"name": n, "target": t, "about": about} for n, t in library().items()]
    if json:
        print_json(rows)
        return
    _table(("name", "target", "about"), [list(row.values()) for row in rows])


def _first_comment(text: str) -> str:
    """A config file's description: its first comment that is no Hydra directive."""
    for line in text.splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line[2:]
    return ""


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    """In columns, of which the last alone gives way to a narrow terminal. Plain text, as Rich's
    tables take a third of a second for a hundred rows."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows)]
    taken = sum(widths[:-1]) + 2 * (len(widths) - 1)
    left = max(shutil.get_terminal_size().columns - taken, 12)

    def line(cells: Sequence[str]) -> str:
        *first, last = cells
        shown = last if len(last) <= left else last[: left - 1] + "…"
        return "  ".join([*(cell.ljust(width) for cell, width in zip(first, widths)), shown])

    typer.secho(line(columns), bold=True)
    for row in rows:
        print(line(row))
