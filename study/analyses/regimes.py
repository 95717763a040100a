"""Exponents of losses over samples or widths, in the regimes that scaling laws have."""

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import least_squares

from study.analyses import BySeed, Table, setting
from study.analyses.laws import matching
from study.analyses.seeds import pseudo_values
from study.plots import COLOURS, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def exponents(table: Table, *, families: dict[str, str], of: str, metric: str) -> BySeed:
    """By family and seed the exponent α of L ∝ x^−α, by least squares of the logarithms.

    Args:
        families: pattern of its arms, as `data_*`, by name.
        of: key of the configuration that is x.
        metric: the loss.

    Raises:
        ValueError: for a pattern that no arm has, or a family with one value of x.
    """
    found: BySeed = {}
    for family, pattern in families.items():
        for seed, (x, y) in curves(table, pattern, of, metric).items():
            found.setdefault(family, {})[seed] = -float(np.polyfit(np.log(x), np.log(y), 1)[0])
    return found


def above_limit(
    table: Table, *, families: dict[str, str], of: str, metric: str, limit: str
) -> BySeed:
    """By family the exponent α of L − L(limit) = A·x^−α, as jackknife pseudo-values by seed of the
    fit to the mean loss over seeds, by least squares weighted by x, as a loss differs from its mean
    by about 1/√x.

    Args:
        families, of, metric: as for `exponents`.
        limit: arm whose loss of the same seed is that of infinite x; it belongs to no family.

    Raises:
        ValueError: for a pattern that no arm has, a family with one value of x, or fewer than three
            seeds.
    """
    found: BySeed = {}
    for family, pattern in families.items():
        above = excesses(table, pattern, of, metric, limit)
        x = next(iter(above.values()))[0]
        rows = {seed: y for seed, (_, y) in above.items()}
        found[family] = pseudo_values(rows, lambda y, x=x: decay(x, np.mean(y, axis=0)), family)
    return found


def decay(x: np.ndarray, excess: np.ndarray) -> float:
    """α of A·x^−α, both (points,), by least squares weighted by x."""

    def errors(values: np.ndarray) -> np.ndarray:
        return (values[0] * (x / x[0]) ** -values[1] - excess) * np.sqrt(x)

    return float(least_squares(errors, [excess[0], 1.0], x_scale=[abs(excess[0]) or 1.0, 1.0]).x[1])


def duality(
    table: Table, *, data: dict[str, Any], width: dict[str, Any], families: list[str]
) -> BySeed:
    """`ratio`, the exponents in data over those in width, in the geometric mean over families.

    Args:
        data, width: arguments of `exponents`, both with these families.
        families: their names.

    Raises:
        ValueError: for an exponent that is not positive.
    """
    first, second = exponents(table, **data), exponents(table, **width)
    found: dict[int, float] = {}
    for seed in first[families[0]]:
        pairs = np.array([(first[f][seed], second[f][seed]) for f in families])
        if not (pairs > 0).all():
            raise ValueError(f"seed {seed}: an exponent is not positive")
        found[seed] = float(np.exp(np.log(pairs[:, 0] / pairs[:, 1]).mean()))
    return {"ratio": found}


def curves(
    table: Table, pattern: str, of: str, metric: str, without: str | None = None
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """By seed, x and loss of the arms of a family, each (arms,), x rising.

    Raises:
        ValueError: for a pattern that no arm has, or one value of x.
    """
    arms = matching(dict.fromkeys(run["arm"] for run in table), "families", [pattern]) - {without}
    points: dict[int, list[tuple[float, float]]] = {}
    for run in table:
        if run["arm"] in arms and metric in run["metrics"]:
            place = float(setting(run, of))
            points.setdefault(run["seed"], []).append((place, run["metrics"][metric]))
    if any(len(dict(own)) < 2 for own in points.values()):
        raise ValueError(f"of: the arms '{pattern}' have one value of {of}")
    return {seed: tuple(np.array(sorted(own)).T) for seed, own in points.items()}  # type: ignore[misc]


def excesses(
    table: Table, pattern: str, of: str, metric: str, limit: str
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """`curves` of the losses above the limit's."""
    least = {r["seed"]: r["metrics"][metric] for r in table if r["arm"] == limit and r["metrics"]}
    own = curves(table, pattern, of, metric, without=limit)
    return {seed: (x, y - least[seed]) for seed, (x, y) in own.items() if seed in least}


def panels(table: Table, *, panels: dict[str, dict[str, Any]]) -> "Figure":
    """Losses over x, both axes logarithmic: of each seed as dots, and the mean as a line, with the
    mean exponent in the legend.

    Args:
        panels: arguments of `exponents`, or with `limit` of `above_limit`, by title.
    """
    drawn = figure(5 * -(-len(panels) // 2), 7)
    places = drawn.subplots(2, -(-len(panels) // 2), squeeze=False).ravel()
    for axes, (title, arguments) in zip(places, panels.items()):
        limit = "limit" in arguments
        slopes = (above_limit if limit else exponents)(table, **arguments)
        rest = {key: value for key, value in arguments.items() if key != "families"}
        for number, (family, pattern) in enumerate(arguments["families"].items()):
            rows = list((excesses if limit else curves)(table, pattern, **rest).values())
            x, colour = rows[0][0], COLOURS[number % len(COLOURS)]
            for _, y in rows:
                axes.plot(x, y, "o", color=colour, ms=3, alpha=0.4)
            label = f"{family}: {np.mean(list(slopes[family].values())):.2f}"
            axes.plot(x, np.mean([y for _, y in rows], axis=0), color=colour, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(arguments["of"])
        axes.set_ylabel("loss above its limit" if limit else "loss")
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False, fontsize=8, title="exponent", title_fontsize=8)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    return drawn
