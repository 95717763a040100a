"""One self-contained HTML page about a recipe, a sweep or any runs."""

import base64
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import yaml

from study import plots, probe_figures, reproduce, selections, sweep
from study.collect import Collection
from study.commands import command
from study.compare import Group, differences, metrics, shown, with_interval
from study.record import reproduction
from training.components import call, factory

TEMPLATE = Path(__file__).parent / "report.html.tmpl"
OUTCOME_COLOURS = {
    "reproduced": plots.COLOURS[2],
    "contradicted": plots.COLOURS[1],
    "inconclusive": plots.COLOURS[6],
}
MOST_CURVES = 8
"""Trials of a sweep that are drawn, the best ones."""


@dataclass
class Table:
    """A table of text: its caption, header and rows, the first cell of each naming it."""

    caption: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)


def page(collection: Collection, again: str) -> str:
    """The page as HTML text.

    Args:
        collection: what it is about.
        again: the command that makes this page.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["code"] = _code
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    study, swept = collection.study, collection.sweep
    return template.render(
        title=_title(collection),
        kind="recipe" if study else "sweep" if swept else "runs",
        study=study,
        overall=reproduce.overall(study) if study else None,
        claims=_claims(collection),
        sweep=_sweep(collection),
        figures=_figures(collection),
        selections=_selections(collection),
        arms=_arms(collection),
        tuning=_tuning(collection),
        runs=_runs(collection),
        missing=_missing(collection),
        changed=_changed(collection),
        environment=_environment(collection),
        commands=_commands(collection, again),
    )


def _title(collection: Collection) -> str:
    if collection.study is not None:
        first = collection.study.recipe.path.read_text(encoding="utf-8").splitlines()[0]
        return first.lstrip("# ") if first.startswith("#") else collection.title
    return f"Sweep {collection.title}" if collection.sweep else collection.title


def _claims(collection: Collection) -> list[dict[str, Any]]:
    if collection.study is None:
        return []
    rows = []
    for claim, verdict, note in collection.study.verdicts:
        row: dict[str, Any] = {"text": claim.text, "outcome": "inconclusive", "note": note}
        if verdict is not None:
            row |= {
                "outcome": verdict.outcome,
                "effect": with_interval(verdict.mean, verdict.interval, sign="+"),
                "margin": f"{verdict.margin:g}" if verdict.margin else "",
                "p": f"{verdict.p:.2g}",
                "standardised": "-" if verdict.effect is None else f"{verdict.effect:+.2f}",
                "seeds": verdict.seeds,
                "further": verdict.further_seeds,
            }
        rows.append(row)
    return rows


def _sweep(collection: Collection) -> dict[str, Any] | None:
    swept = collection.sweep
    if swept is None:
        return None
    counts = sorted(sweep.counts(collection.slots).items())
    best = sweep.best(swept, collection.slots)
    return {
        "metric": swept.metric,
        "trials": swept.trials,
        "counts": ", ".join(f"{n} {state}" for state, n in counts),
        "best": best and f"{best.value:.6g}",
        "point": best and " ".join(f"{k}={v}" for k, v in best.parameters.items()),
        "number": best and best.number,
    }


def _figures(collection: Collection) -> list[tuple[str, str]]:
    """Captions and SVG."""
    found = []
    study = collection.study
    if study is not None and (rows := _interval_rows(collection)):
        found.append(("Effect of each claim with its 95% interval", plots.intervals(rows)))
    if study is not None:
        runs = reproduce.table(study)
        for name, node in study.recipe.figures.items():
            where = f"{study.recipe.path}: figures.{name}"
            found.append((name.replace("_", " "), call(factory(node, where), where, runs)))
    if collection.sweep is not None:
        swept, names = collection.sweep, {"best": "Best value so far"}
        names |= {"parallel": "Parallel coordinates", "importance": "Parameter importance"}
        drawn = plots.sweep(sweep.load(swept), swept.metric)
        found += [(names[name], figure) for name, figure in drawn.items()]
    shown = _shown(collection)
    if study is None:
        rows = [{"arm": group.label, **run} for group in shown for run in group.runs]
        found += probe_figures.own(rows)
    if study is not None and len(study.seeds) > 1:
        metric = study.recipe.metric
        values = {group.label: group.values(metric) for group in shown}
        found.append((f"{metric} by seed", plots.by_seed(values, metric)))
    curves = {group.label: [run["lines"] for run in group.runs] for group in shown}
    for metric in _drawn_metrics(collection):
        title = f"{metric} over steps"
        if len(shown) < len(collection.groups):
            title += f", the {len(shown)} best of {len(collection.groups)}"
        found.append((title, plots.curves(curves, metric)))
    return [(caption, plots.svg(figure, caption)) for caption, figure in found]


def _selections(collection: Collection) -> list[dict[str, Any]]:
    """What the stages of each group's first run kept of its training set."""
    shown = []
    for group in _shown(collection):
        folder = Path(group.runs[0]["run_dir"])
        for name, about in selections.found(folder).items():
            title = group.label if name in group.label else f"{group.label}: {name}"
            title += f", seed {group.runs[0]['config']['seed']}"
            pictures = about["pictures"] and (folder / selections.FOLDER / about["pictures"])
            shown.append(
                {
                    "title": title,
                    "drawing": plots.svg(selections.histogram(about), f"Scores, {title}"),
                    "numbers": _selection_numbers(about),
                    "groups": _selection_groups(about),
                    "examples": _selection_examples(about),
                    "pictures": pictures and base64.b64encode(pictures.read_bytes()).decode(),
                }
            )
    return shown


def _selection_numbers(about: dict[str, Any]) -> Table:
    table = Table("What was kept", ["", "value"])
    table.rows = [
        ["samples", f"{about['samples']:,}"],
        ["kept", f"{about['kept']:,} ({about['kept'] / about['samples']:.1%})"],
        ["threshold", _number(about["threshold"])],
        ["scores from the cache", "yes" if about["from_cache"] else "no"],
    ]
    if about["drawn"] != about["kept"]:
        table.rows.insert(2, ["with repetitions", f"{about['drawn']:,}"])
    if about["weights"]:
        table.rows.append(["weights", " to ".join(map(_number, about["weights"]))])
    table.rows += [[f"quantile {q}", _number(v)] for q, v in about["quantiles"].items()]
    return table


def _selection_groups(about: dict[str, Any]) -> Table | None:
    if not about["groups"]:
        return None
    table = Table("By domain or class", ["", "samples", "kept", "share of it", "share of the kept"])
    for name, (before, after) in about["groups"].items():
        shares = (f"{after / before:.1%}", f"{after / about['kept']:.1%}")
        table.rows.append([name, f"{before:,}", f"{after:,}", *shares])
    return table


def _selection_examples(about: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Samples of the lowest and highest scores, where they are text."""
    found = about["examples"].items()
    return [(name, rows) for name, rows in found if any(row["text"] is not None for row in rows)]


def _interval_rows(
    collection: Collection,
) -> list[tuple[str, float, float, float, float, str]]:
    assert collection.study is not None
    return [
        (
            f"{claim.text}: {verdict.outcome}",
            verdict.mean,
            verdict.interval.low,
            verdict.interval.high,
            verdict.margin,
            OUTCOME_COLOURS[verdict.outcome],
        )
        for claim, verdict, _ in collection.study.verdicts
        if verdict is not None
    ]


def _drawn_metrics(collection: Collection) -> list[str]:
    """`loss`, and what the recipe or sweep is judged by where it is a curve, without prefixes."""
    judged = ""
    if collection.study is not None:
        judged = collection.study.recipe.metric
    elif collection.sweep is not None:
        judged = collection.sweep.metric
    kind, _, name = judged.partition("/")
    lines = collection.groups[0].runs[0]["lines"]
    curve = sum(f"val/{name}" in line or f"train/{name}" in line for line in lines) > 1
    return ["loss", name] if kind in ("val", "train") and name != "loss" and curve else ["loss"]


def _shown(collection: Collection) -> list[Group]:
    """Groups of the figures and tables: of a sweep, whose trials are many, the best."""
    return collection.groups[:MOST_CURVES] if collection.sweep else collection.groups


def _arms(collection: Collection) -> Table:
    """Means and intervals of each group; metrics by layer or head are left to the figures."""
    groups = _shown(collection)
    # What callbacks record by layer would be pages.
    names = [n for n in metrics(groups) if n.count("/") < 2]
    table = Table("Mean over seeds with its 95% t interval", ["", *(g.label for g in groups)])
    if collection.study is not None:
        chosen = collection.study.chosen
        points = [" ".join(chosen.get(group.label, ())) or "-" for group in groups]
        if any(point != "-" for point in points):
            table.rows.append(["tuned to", *points])
    table.rows.append(["seeds", *(str(len(group.runs)) for group in groups)])
    for name in names:
        means = [group.mean(name) for group in groups]
        table.rows.append([name, *(with_interval(*mean) if mean else "-" for mean in means)])
    return table


def _tuning(collection: Collection) -> Table | None:
    study = collection.study
    if study is None or not study.tuning:
        return None
    metric = study.recipe.metric
    budget = len(reproduce.points(study.recipe)) * len(study.recipe.tuning.seeds)
    caption = f"Tuning: {metric} of every arm at every point; {budget} runs for each arm"
    table = Table(caption, ["point", *study.recipe.arms])
    for point in reproduce.points(study.recipe):
        cells = []
        for arm in study.recipe.arms:
            trials = [t for t in study.tuning if t.arm == arm and t.point == point]
            values = [t.values().get(metric) for t in trials]
            known = [v for v in values if isinstance(v, int | float)]
            text = f"{sum(known) / len(known):.5g}" if known else "-"
            if any(t.values().get("diverged") for t in trials):
                text = "diverged"
            if study.chosen.get(arm) == point:
                text += " (chosen, at the grid's edge)" if _at_edge(study, point) else " (chosen)"
            cells.append(text)
        table.rows.append([" ".join(point), *cells])
    return table


def _at_edge(study: reproduce.Study, point: tuple[str, ...]) -> bool:
    """Whether a better point may lie beyond the grid: some key has its first or last value."""
    grid = study.recipe.tuning.grid.values()
    ends = [set(map(reproduce.written, (v[0], v[-1]))) if len(v) > 1 else set() for v in grid]
    return any(part.partition("=")[2] in end for part, end in zip(point, ends))


def _runs(collection: Collection) -> Table:
    table = Table("Every run", ["run", "seed", "status", "step", "minutes"])
    names = [n for n in metrics(collection.groups) if n.startswith(("val/", "train/loss"))]
    table.header += [*names, "folder"]
    for group in collection.groups:
        for run in group.runs:
            minutes = run["metrics"].get("seconds", 0) / 60
            values = (run["metrics"].get(name) for name in names)
            cells = [str(run["config"]["seed"]), run["status"], str(run["step"]), f"{minutes:.2f}"]
            table.rows.append([group.label, *cells, *map(_number, values), run["run_dir"]])
    return table


def _missing(collection: Collection) -> list[tuple[str, str]]:
    """Runs without a result and why."""
    study = collection.study
    if study is not None:
        trials = [*study.tuning, *study.trials]
        return [(t.label, reason) for t in trials if (reason := t.missing()) is not None]
    return [
        (f"trial {slot.number}", slot.reason or slot.state)
        for slot in collection.slots
        if slot.state not in ("complete", "pruned")
    ]


def _changed(collection: Collection) -> Table | None:
    groups = _shown(collection)
    changed = differences([group.config for group in groups], but=("seed",))
    if not changed:
        return None
    table = Table("Configuration keys that differ", ["key", *(group.label for group in groups)])
    table.rows = [[key, *map(_number, values)] for key, values in changed.items()]
    return table


def _environment(collection: Collection) -> Table:
    """What the runs ran on and with; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for group in collection.groups:
        for run in group.runs:
            path = Path(run["run_dir"]) / "environment.json"
            about = json.loads(path.read_text()) if path.is_file() else {}
            about.pop("command", None)
            for key, value in _flat(about):
                found.setdefault(key, {})[str(value)] = None
    rows = [[key, "; ".join(values)] for key, values in found.items()]
    return Table("Machine and versions", ["", "value"], rows)


def _commands(collection: Collection, again: str) -> list[tuple[str, str]]:
    """What each command does, and the command."""
    found = []
    if (study := collection.study) is not None:
        found.append(("train what is missing and judge", reproduction(study, study.outputs)))
    elif (swept := collection.sweep) is not None:
        words = ["assay", "sweep", "--resume", "--name", swept.name]
        found.append(("go on with the sweep", command(words, outputs=swept.outputs)))
    for group in _shown(collection):
        path = Path(group.runs[0]["run_dir"]) / "overrides.yaml"
        overrides = yaml.safe_load(path.read_text()) if path.is_file() else []
        found.append((f"train {group.label} alone", shlex.join(["assay", "run", *overrides])))
    return [*found, ("make this page", again)]


def _flat(node: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in node.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name} ") if isinstance(value, dict) else [(name, value)]
    return [(name, value) for name, value in rows if value not in (None, [])]


def _code(text: str) -> markupsafe.Markup:
    """Text in which what stands between backquotes is code."""
    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def _number(value: Any) -> str:
    return "-" if value is None else shown(value)
