"""Pictures of runs, as PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.files import write_atomically

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

Lines = list[dict[str, Any]]


def losses(runs: Mapping[str, Lines], path: Path, metric: str = "loss") -> None:
    """Draw `train/<metric>` (thin) and `val/<metric>` (dots) over steps, one colour for each run.

    Args:
        runs: lines of `metrics.jsonl` by label.
        path: of the PNG.
        metric: without its prefix.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, lines) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        dashes = "-" if number < len(COLOURS) else "--"
        steps, values = _points(lines, f"val/{metric}")
        if len(runs) == 1:
            axes.plot(*_points(lines, f"train/{metric}"), color=colour, lw=1, label="train")
            axes.plot(steps, values, "o-", color=COLOURS[1], ms=4, label="validation")
        else:
            axes.plot(*_points(lines, f"train/{metric}"), color=colour, lw=0.6, alpha=0.5)
            axes.plot(steps, values, "o", ls=dashes, color=colour, ms=4, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.25)
    if len(runs) == 1:
        axes.set_title(next(iter(runs)), fontsize=10)
    else:
        axes.set_title("line: training, dots: validation", fontsize=10)
    if runs:
        axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, picture.getvalue())


def sweep(study: Any, folder: Path, metric: str) -> list[Path]:
    """Draw a sweep's best value so far, parallel coordinates and parameter importances, as PNG.

    Args:
        study: Optuna's.
        folder: where they go.
        metric: what the values are.

    Returns:
        The files; none of a plot that has too few trials.
    """
    import warnings

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as draw

    drawn: dict[str, Any] = {
        "best.png": lambda: draw.plot_optimization_history(study, target_name=metric),
        "parallel.png": lambda: draw.plot_parallel_coordinate(study, target_name=metric),
        "importance.png": lambda: draw.plot_param_importances(study, target_name=metric),
    }
    found = []
    for name, make in drawn.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls these experimental
            try:
                axes = make()
            except (ValueError, RuntimeError):  # too few complete trials, or no variance
                continue
        figure: Any = axes.figure
        figure.set_size_inches(8, 4.5)
        path = folder / name
        figure.savefig(path, dpi=150, bbox_inches="tight")
        pyplot.close(figure)
        found.append(path)
    return found


def _points(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    return [step for step, _ in found], [value for _, value in found]
