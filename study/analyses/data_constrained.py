"""Where the loss ends on a fixed training set: of ever larger models, and of ever more of them."""

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from study import laws
from study.analyses import BySeed, Table
from study.analyses.merging import restored
from study.fitting import Fit, fit
from study.plots import COLOURS, figure
from tasks.losses import IGNORED
from techniques.callback import probing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[np.ndarray, np.ndarray, Fit]


def asymptotes(table: Table, *, single: list[str], member: str, size: int = 4) -> BySeed:
    """The floors E of L(N) = E + A/N^α, N the parameters of one model, and of L(K) = E + A/K^α, K
    the members of an ensemble, whose probabilities are averaged. Seeds are taken `size` at a time;
    a group's values go by its first seed.

    Args:
        table: the runs, of language models of one validation set.
        single: arms of one model each, of at least three sizes.
        member: arm whose runs are the ensembles' members.
        size: of the largest ensemble; L(K) is the mean over all ensembles of K of a group.

    Returns:
        By first seed: `single` and `ensemble`, the floors; `largest`, the mean loss of the largest
        single models; `together`, that of the ensemble of all members.

    Raises:
        ValueError: for fewer seeds than `size`, an arm that is not there, or too few sizes.

    Source: "Pre-training under infinite compute", arXiv 2509.14786; no code was read.
    """
    found: BySeed = {name: {} for name in ("single", "ensemble", "largest", "together")}
    for seed, sizes, members in _curves(table, single, member, size):
        found["single"][seed] = float(np.exp(sizes[2].values["log_E"]))
        found["ensemble"][seed] = float(np.exp(members[2].values["log_E"]))
        found["largest"][seed] = float(sizes[1][sizes[0].argmax()])
        found["together"][seed] = float(members[1][-1])
    return found


def drawn(table: Table, *, single: list[str], member: str, size: int = 4) -> "Figure":
    """Loss over the parameters of one model, and over those of all members, with the fitted laws.

    Args:
        table, single, member, size: as for `asymptotes`.
    """
    made = figure(6, 4)
    axes = made.subplots()
    each = next(run["metrics"]["parameters"] for run in table if run["arm"] == member)
    for number, (_, sizes, members) in enumerate(_curves(table, single, member, size)):
        for (x, losses, found), scale, colour, name in (
            (sizes, 1, COLOURS[0], "one model"),
            (members, each, COLOURS[1], f"ensembles of {member}"),
        ):
            label = None if number else name
            axes.plot(scale * x, losses, "o", ms=4, color=colour, label=label)
            order = np.argsort(x)
            axes.plot(scale * x[order], found.predicted[order], color=colour, lw=1)
            axes.axhline(np.exp(found.values["log_E"]), color=colour, lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_xlabel("parameters (dotted: the fitted floors)")
    axes.set_ylabel("validation loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return made


def _curves(
    table: Table, single: list[str], member: str, size: int
) -> list[tuple[int, Curve, Curve]]:
    """By group its first seed, the curve of sizes and that of ensembles: x, losses and fit."""
    rows = {(run["arm"], run["seed"]): run for run in table if run["metrics"]}
    arms = [*single, member]
    seeds = sorted({seed for _, seed in rows if all((arm, seed) in rows for arm in arms)})
    groups = [seeds[i : i + size] for i in range(0, len(seeds) - size + 1, size)]
    if not groups:
        raise ValueError(
            f"size: {len(seeds)} seeds with a run of every arm make no group of {size}"
        )
    curves = []
    for group in groups:
        sizes = np.array([rows[arm, group[0]]["metrics"]["parameters"] for arm in single])
        losses = [np.mean([rows[a, s]["metrics"]["val/loss"] for s in group]) for a in single]
        members = ensembles([probabilities(rows[member, seed]) for seed in group])
        counts = np.arange(1.0, size + 1)
        curves.append((group[0], _fitted(sizes, np.array(losses)), _fitted(counts, members)))
    return curves


def ensembles(said: list[np.ndarray]) -> np.ndarray:
    """Mean loss of all ensembles of 1, 2, ... members, of the probabilities (labels,) that each
    member gives the true labels: (members,)."""
    return np.array(
        [
            np.mean([-np.log(np.mean(some, axis=0)).mean() for some in combinations(said, count)])
            for count in range(1, len(said) + 1)
        ]
    )


def probabilities(row: dict[str, Any]) -> np.ndarray:
    """Of the true labels of the validation set, (labels,), float64."""
    run = restored(row)
    found = []
    for batch, outputs in probing.validation(run):
        labels = batch["labels"]
        kept = labels != IGNORED
        logs = outputs["logits"].double().log_softmax(-1)[kept]
        found.append(logs.gather(-1, labels[kept][:, None]).exp().squeeze(-1).cpu())
    return torch.cat(found).numpy()


def _fitted(x: np.ndarray, losses: np.ndarray) -> Curve:
    return x, losses, fit(laws.find("power"), {"x": x}, losses)
