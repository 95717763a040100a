"""What many trained models are worth together: their probabilities averaged, or their weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from models.outputs import Outputs
from study.analyses import BySeed, Table
from study.analyses.merging import restored
from study.plots import COLOURS, figure
from tasks.fetch import fetch
from techniques.callback import probing
from training import checkpoint
from training.components import call, factory
from training.evaluate import evaluate
from training.objective import inputs_of
from training.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = ("error", "nll", "brier")


def combined(table: Table, *, arms: list[str], metric: str = "val/accuracy") -> BySeed:
    """By seed, a metric of the runs of some arms, one model each, which started from one model:

    - `member`: the runs' mean;
    - `ensemble`: of the mean of their probabilities;
    - `moving`: the mean over runs of the metric of the mean of the weights of a run's checkpoints,
      a moving average along one run as far as its checkpoints were kept;
    - `apart`: of the mean of weights of as many runs that started from different models: those of
      the arms in turn, each of the next seed (the first follows the last).

    Args:
        table: the runs.
        arms: of one architecture and task.
        metric: of evaluation.

    Raises:
        ValueError: when no seed has a finished run of every arm.
    """
    rows = {(run["arm"], run["seed"]): run for run in table if run["metrics"]}
    seeds = sorted({seed for _, seed in rows if all((arm, seed) in rows for arm in arms)})
    if not seeds:
        raise ValueError(f"no seed has a finished run of each of the arms {', '.join(arms)}")
    found: BySeed = {name: {} for name in ("member", "ensemble", "moving", "apart")}
    for place, seed in enumerate(seeds):
        own = [rows[arm, seed] for arm in arms]
        turns = [seeds[(place + i) % len(seeds)] for i in range(len(arms))]
        others = [rows[arm, other] for arm, other in zip(arms, turns)]
        run = restored(own[0])
        found["member"][seed] = float(np.mean([row["metrics"][metric] for row in own]))
        found["apart"][seed] = _of_mean(run, [_last(row) for row in others], metric)
        along = [_of_mean(run, _kept(row), metric) for row in own]
        found["moving"][seed] = float(np.mean(along))
        run.objective.model = Ensemble([restored(row).model for row in own])
        found["ensemble"][seed] = evaluate(run)[metric]
    return found


class Ensemble(nn.Module):
    """The mean of models' probabilities, as `logits` that are its logarithm."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models, self.inputs = nn.ModuleList(models), inputs_of(models[0])

    def forward(self, **inputs: Tensor) -> Outputs:
        said = [model(**inputs)["logits"].log_softmax(-1) for model in self.models]
        return Outputs(logits=torch.stack(said).logsumexp(0) - np.log(len(said)))


def against_larger(
    table: Table,
    *,
    ensembles: list[str],
    larger: dict[str, str],
    shifts: dict[str, Any],
    size: int = 4,
) -> BySeed:
    """Ensembles of small models beside single models of every size, on the validation set and on
    shifted copies of it. Seeds are taken `size` at a time; a group's values go by its first seed.

    - `robust_error`, `robust_nll`, `robust_brier`: effective robustness, by how much an ensemble
      does better on shifted data than the straight line through single models (all arms, the
      group's seeds) has it for the ensemble's value without shift; `fit_...` is that line's R²;
    - `gain_...`: by how much an ensemble does better on shifted data than its members;
    - `diverse_in`, `diverse_out`: Pearson's correlation over samples, without and with shift, of an
      ensemble's diversity (the members' mean negative log-likelihood less the ensemble's, which is
      Jensen's gap) with what a larger model gains: the mean negative log-likelihood of small models
      of the next group, which have no part in the ensemble, less that of the larger ones;
    - `detect_ensemble`, `detect_average`, `detect_larger`: area under the ROC curve of telling
      shifted samples by the entropy of the ensemble, by the mean of its members', which is the
      ensemble's less its diversity (Jensen-Shannon), and by the mean of the larger models'.

    All are means over shifts and over the arms that have ensembles or a larger model.

    Args:
        table: the runs, whose arms are sizes of one model and whose seeds are members.
        ensembles: the arms that ensembles are made of.
        larger: by arm, the larger one that it is compared with.
        shifts: by name a component that is a transform of a dataset, as `tasks.corruptions`.
        size: members of an ensemble.

    Raises:
        ValueError: for fewer than two groups of seeds.

    Source: "Deep Ensembles Work, But Are They Necessary?", arXiv 2202.06985;
    https://github.com/cellistigs/interp_ensembles, `scripts/plot_conditional_variance.py` and, in
    its branch imagenet_pl, `etc/ekb/plot/plot_metrics.py`. There the larger model's gain is over
    one small model that the ensemble's gain is measured from too.
    """
    said, labels = _said(table, shifts)
    groups = _groups(said, size)
    found: BySeed = {}

    def note(seed: int, name: str, values: list[float]) -> None:
        found.setdefault(name, {})[seed] = float(np.mean(values))

    for number, group in enumerate(groups):
        for metric in METRICS:
            for name, values in _trend(said, labels, ensembles, group, metric).items():
                note(group[0], f"{name}_{metric}", values)
        gains: dict[str, list[float]] = {"diverse_in": [], "diverse_out": []}
        areas: dict[str, list[float]] = {}
        following = groups[(number + 1) % len(groups)]
        for small, large in larger.items():
            members, big = (np.stack([said[arm, s] for s in group]) for arm in (small, large))
            others = np.stack([said[small, s] for s in following])
            likelihoods = [_nll(p, labels) for p in (members, others, big)]
            gap = likelihoods[0].mean(0) - _nll(members.mean(0), labels)
            gain = likelihoods[1].mean(0) - likelihoods[2].mean(0)
            for i in range(len(gap)):  # without shift first
                r = float(np.corrcoef(gap[i], gain[i])[0, 1])
                gains["diverse_out" if i else "diverse_in"].append(r)
            uncertain = {
                "detect_ensemble": _entropy(members.mean(0)),
                "detect_average": _entropy(members).mean(0),
                "detect_larger": _entropy(big).mean(0),
            }
            for name, entropies in uncertain.items():
                areas.setdefault(name, []).extend(_areas(entropies))
        for name, values in (gains | areas).items():
            note(group[0], name, values)
    return found


def trends(
    table: Table, *, ensembles: list[str], shifts: dict[str, Any], size: int = 4
) -> "Figure":
    """Single models (dots, one colour for each arm) and ensembles (stars): each metric with each
    shift over that without, and the straight lines through both. Lower is better.

    Args:
        table, ensembles, shifts, size: as for `against_larger`.
    """
    said, labels = _said(table, shifts)
    arms = list(dict.fromkeys(arm for arm, _ in said))
    drawn = figure(3.2 * len(shifts), 8.5)
    grid = drawn.subplots(len(METRICS), len(shifts), squeeze=False)
    for axes_row, metric in zip(grid, METRICS):
        singles = {key: _measured(p, labels, metric) for key, p in said.items()}
        groups = _groups(said, size)
        means = [
            np.mean([said[a, s] for s in group], axis=0) for a in ensembles for group in groups
        ]
        together = np.array([_measured(p, labels, metric) for p in means])
        for i, (axes, shift) in enumerate(zip(axes_row, shifts), 1):
            for colour, arm in zip(COLOURS, arms):
                points = np.array([v for (a, _), v in singles.items() if a == arm])
                axes.plot(points[:, 0], points[:, i], "o", ms=3, color=colour, label=arm)
            axes.plot(together[:, 0], together[:, i], "k*", ms=7, mfc="none", label="ensembles")
            for points, dashes in ((np.array([*singles.values()]), "-"), (together, ":")):
                ends = np.array([points[:, 0].min(), points[:, 0].max()])
                axes.plot(ends, _line(points[:, 0], points[:, i])[0](ends), "k" + dashes, lw=1)
            axes.set_xlabel(metric)
            axes.set_ylabel(f"{metric}, {shift}")
            axes.grid(alpha=0.25)
    grid[0][0].legend(frameon=False, fontsize=7)
    return drawn


Said = dict[tuple[str, int], np.ndarray]
"""By arm and seed, probabilities (sets, samples, classes), the set without shift first."""


class _Line(NamedTuple):
    """A fitted line, and how much of the variance it explains."""

    at: Any
    r2: float


def _said(table: Table, shifts: dict[str, Any]) -> tuple[Said, np.ndarray]:
    """What each run's last model says, and the labels (samples,)."""
    transforms = [factory(node, f"shifts.{name}") for name, node in shifts.items()]
    said: Said = {}
    sets: list[Any] = []
    runs: dict[str, Run] = {}
    for row in table:
        if not row["metrics"]:
            continue
        run = runs.setdefault(row["arm"], restored(row)) if row["arm"] not in runs else None
        run = run or runs[row["arm"]]
        checkpoint.load_model_of(_last(row), run.model)
        sets = sets or [run.task.validation] + [
            call(transform, "shifts", run.task.validation) for transform in transforms
        ]
        said[row["arm"], row["seed"]] = np.stack([_probabilities(run, data) for data in sets])
    labels = fetch(sets[0], torch.arange(len(sets[0])))["labels"].numpy()
    return said, labels


def _probabilities(run: Run, data: Any) -> np.ndarray:
    said = (outputs["logits"] for _, outputs in probing.validation(run, data))
    return torch.cat([logits.double().softmax(-1).cpu() for logits in said]).numpy()


def _groups(said: Said, size: int) -> list[list[int]]:
    """Seeds that every arm has, `size` at a time."""
    arms = {arm for arm, _ in said}
    seeds = sorted({seed for _, seed in said if all((arm, seed) in said for arm in arms)})
    groups = [seeds[i : i + size] for i in range(0, len(seeds) - size + 1, size)]
    if len(groups) < 2:
        raise ValueError(f"size: {len(seeds)} seeds do not make two groups of {size}")
    return groups


def _trend(
    said: Said, labels: np.ndarray, ensembles: list[str], group: list[int], metric: str
) -> dict[str, list[float]]:
    """Of one group and metric, for each shift and ensemble."""
    singles = {key: _measured(p, labels, metric) for key, p in said.items() if key[1] in group}
    points = np.array([*singles.values()])
    found: dict[str, list[float]] = {"robust": [], "gain": [], "fit": []}
    for i in range(1, points.shape[1]):
        line = _line(points[:, 0], points[:, i])
        found["fit"].append(line.r2)
        for arm in ensembles:
            together = _measured(np.mean([said[arm, s] for s in group], axis=0), labels, metric)
            found["robust"].append(float(line.at(together[:1])[0] - together[i]))
            alone = np.mean([singles[arm, s][i] for s in group])
            found["gain"].append(float(alone - together[i]))
    return found


def _line(x: np.ndarray, y: np.ndarray) -> _Line:
    from sklearn.linear_model import LinearRegression

    fitted = LinearRegression().fit(x[:, None], y)
    return _Line(lambda at: fitted.predict(at[:, None]), float(fitted.score(x[:, None], y)))


def _measured(p: np.ndarray, labels: np.ndarray, metric: str) -> np.ndarray:
    """A metric of each set, of probabilities (sets, samples, classes)."""
    if metric == "nll":
        return _nll(p, labels).mean(-1)
    if metric == "brier":
        return ((p - np.eye(p.shape[-1])[labels]) ** 2).sum(-1).mean(-1)
    return (p.argmax(-1) != labels).mean(-1)


def _nll(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(p[..., np.arange(len(labels)), labels])


def _entropy(p: np.ndarray) -> np.ndarray:
    from scipy.special import entr

    return entr(p).sum(-1)


def _areas(entropies: np.ndarray) -> Iterator[float]:
    """Of telling each shifted set from the first, of entropies (sets, samples)."""
    from sklearn.metrics import roc_auc_score

    for shifted in entropies[1:]:
        truth = np.repeat([0, 1], len(shifted))
        yield float(roc_auc_score(truth, np.concatenate([entropies[0], shifted])))


def _of_mean(run: Run, checkpoints: list[Path], metric: str) -> float:
    """A metric of the mean of checkpoints' weights, which the run's model has afterwards."""
    mean = AveragedModel(run.model, use_buffers=True)
    for path in checkpoints:
        checkpoint.load_model_of(path, run.model)
        mean.update_parameters(run.model)
    run.model.load_state_dict(mean.module.state_dict())
    return evaluate(run)[metric]


def _kept(row: dict[str, Any]) -> list[Path]:
    return checkpoint.found(Path(row["run_dir"]))


def _last(row: dict[str, Any]) -> Path:
    return _kept(row)[0]
