"""`assay show`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import complete
from cli.output import Json, print_json

if TYPE_CHECKING:
    from rich.console import Console


GALLERIES = ("activations", "losses")


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="A technique, task, model, optimizer or schedule; or activations, or losses.",
            autocompletion=complete.config,
        ),
    ],
    png: Annotated[
        Path | None,
        typer.Option(
            help="Of activations or losses: where the picture goes; default: in outputs/.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show a technique's card, its code's documentation and its verdict; or a config's file; or
    all activations or losses as a picture."""
    from training.configs import find, groups, options
    from training.errors import UsageError, nearest

    if name in GALLERIES:
        _show_gallery(name, png or Path("outputs") / f"{name}.png", json)
        return
    if png is not None:
        raise UsageError(f"--png: only with 'assay show {' or '.join(GALLERIES)}'")
    elsewhere = [group for group in groups() if name in options(group) and group != "technique"]
    try:
        technique = find(name)
    except UsageError as error:
        if not elsewhere:
            known = {option for group in groups() for option in options(group)} | set(GALLERIES)
            raise UsageError(f"nothing is called '{name}'{nearest(name, known)[:200]}") from error
        for group in elsewhere:
            _show_config(group, name, json)
        return
    _show_technique(technique, json)


def _show_technique(name: str, json: bool) -> None:
    from training.catalog import entry, source, targets
    from training.configs import CONF, card

    code = {t: _relative(path) for t in targets(name) if (path := source(t)) is not None}
    about = {**card(name), **entry(name), "code": code}
    if json:
        print_json(about)
        return
    from cli.output import console

    out = console()
    print_card(out, name, about)
    for target in code:
        out.print(f"\n{target}", style="bold", highlight=False)
        out.print(_docstring(target) or "(no docstring)", highlight=False, markup=False)
    text = (CONF / "technique" / f"{name}.yaml").read_text().split("\ntechniques:")[0]
    out.print(f"\nconf/technique/{name}.yaml", style="bold", highlight=False)
    out.print(text, highlight=False, markup=False)
    out.print(f"try it: assay run technique={name}", highlight=False, markup=False)


def _show_config(group: str, name: str, json: bool) -> None:
    import yaml

    from cli.output import console
    from training.configs import CONF

    path = CONF / group / f"{name}.yaml"
    if json:
        print_json({"group": group, "name": name, "config": yaml.safe_load(path.read_text())})
        return
    out = console()
    out.print(_relative(path), style="bold", highlight=False)
    out.print(path.read_text(), highlight=False, markup=False)


def _show_gallery(name: str, png: Path, json: bool) -> None:
    from study import activations, gallery, losses, plots
    from training.errors import EnvironmentFault

    try:
        png.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {png.parent}: {error.strerror}") from error
    shown = {"activations": activations, "losses": losses}[name]
    curves = shown.measure_all()
    plots.save(gallery.draw(curves, shown.CAPTION), png)
    if json:
        rows = [{"name": own.name, **own.numbers} for own in curves]
        print_json({"path": str(png), name: rows})
        return
    from rich.columns import Columns
    from rich.text import Text

    from cli.output import console

    panels = []
    for own in curves:
        panel = Text(f"{own.name[:20]:20}\n", style="bold")
        keys = {"width": 20, "height": 5, "low": own.low, "high": own.high}
        drawn = (gallery.braille(values, **keys) for values in (own.y, own.slope))
        for values, slopes in zip(*drawn):
            for value, slope in zip(values, slopes):
                both = chr(ord(value) | (ord(slope) - 0x2800))
                panel.append(both, style="blue" if value != "\u2800" else "dark_orange")
            panel.append("\n")
        panel.append(f"{own.about}\n", style="dim")
        panels.append(panel)
    out = console()
    out.print(Columns(panels, padding=(0, 2)))
    out.print(shown.CAPTION, style="dim")
    out.print(f"picture: {png}", highlight=False, markup=False, soft_wrap=True)


def print_card(out: "Console", name: str, card: dict[str, Any]) -> None:
    """Print a technique's card."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("technique", Text(name))
    for key, value in card.items():
        if key != "name" and value not in (None, [], {}):
            shown = value if isinstance(value, list | dict) else [value]
            items = shown.items() if isinstance(shown, dict) else ((None, v) for v in shown)
            lines = (f"{k}: {v}" if k else str(v) for k, v in items)
            table.add_row(key, Text("\n".join(lines)))
    out.print(table)


def _docstring(target: str) -> str | None:
    """A class's or function's docstring, read without importing it."""
    import ast

    from training.catalog import source

    path = source(target)
    if path is None:
        return None
    wanted = target.rsplit(".", 1)[-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == wanted:
            return ast.get_docstring(node)
    return None


def _relative(path: Path) -> str:
    from training.catalog import ROOT

    return str(path.relative_to(ROOT))
