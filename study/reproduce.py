"""From a recipe to its verdicts: plan the runs, train what is missing, judge the claims."""

import functools
import itertools
import json
import math
import statistics as plain
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from study.pool import Answer
from study.recipe import Arm, Claim, Recipe, Term
from study.statistics import Verdict, holm, judge
from training.components import call, factory
from training.compose import compose
from training.configs import Config
from training.errors import UsageError, nearest
from training.folder import address, existing, read_summary
from training.metrics import read as read_lines

ENDED = ("completed", "diverged")
BUILT_IN = ("seconds", "parameters", "diverged", "step")
"""Metrics every run has, beside those it records."""


@dataclass
class Trial:
    """One run of a recipe: an arm with a seed, and when tuning a point of the grid.

    `answer` is filled when it has ended: with its `summary`, or the `error`.
    """

    arm: str
    seed: int
    overrides: list[str]
    config: Config
    point: tuple[str, ...] = ()
    tuning: bool = False
    answer: Answer | None = None

    @property
    def label(self) -> str:
        """As progress shows it."""
        return " ".join([self.arm, *self.point, f"seed {self.seed}"])

    @property
    def summary(self) -> dict[str, Any]:
        """Of the run; empty until it has ended with one."""
        return (self.answer or {}).get("summary") or {}

    @property
    def folder(self) -> Path | None:
        """Of the run, once it has ended."""
        folder = self.summary.get("run_dir")
        return Path(folder) if folder else None

    def values(self) -> dict[str, float]:
        """Its last metrics and the built-in ones; empty until it has ended."""
        summary = self.summary
        if summary.get("status") not in ENDED:
            return {}
        found = {k: v for k, v in summary["metrics"].items() if isinstance(v, int | float)}
        built_in = {name: summary[name] for name in ("seconds", "parameters", "step")}
        return {**found, **built_in, "diverged": float(summary["status"] == "diverged")}

    def missing(self) -> str | None:
        """Why it has no values, if so."""
        if self.answer is None:
            return "not run"
        if "error" in self.answer:
            return self.answer["error"]
        status = self.answer["summary"]["status"]
        reason = self.answer["summary"].get("reason")
        return None if status in ENDED else f"{status}: {reason}"


@dataclass
class Study:
    """A recipe's runs so far, the chosen point of each arm's grid, and the verdicts."""

    recipe: Recipe
    seeds: tuple[int, ...]
    outputs: str
    tuning: list[Trial] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    chosen: dict[str, tuple[str, ...]] = field(default_factory=dict)
    verdicts: list[tuple[Claim, Verdict | None, str]] = field(default_factory=list)


Done = Callable[[Trial, int, int], None]
"""Called as a trial ends, with how many have and how many there are in this round."""


def plan(recipe: Recipe, seeds: tuple[int, ...], outputs: str) -> Study:
    """The runs that need no other run's result: all of a recipe without tuning.

    Raises:
        UsageError: for overrides that do not compose.
    """
    study = Study(recipe, seeds, outputs)
    if recipe.tuning.grid:
        _plan_tuning(study, _levels(recipe)[0])
    else:
        study.chosen = dict.fromkeys(recipe.arms, ())
        study.trials = _evaluation(study)
        for trial in study.trials:
            trial.answer = cached(trial)
    return study


def points(recipe: Recipe) -> list[tuple[str, ...]]:
    """Every point of the tuning grid, as overrides."""
    grid = recipe.tuning.grid
    return [
        tuple(f"{key}={written(value)}" for key, value in zip(grid, values))
        for values in itertools.product(*grid.values())
    ]


def cached(trial: Trial) -> Answer | None:
    """The answer of a run that has ended already."""
    for folder in existing(trial.config):
        summary = read_summary(folder)
        if summary.get("status") in ENDED:
            return {"summary": summary}
    return None


def train(study: Study, pool: Any, done: Done) -> None:
    """Train what is missing: first the tuning, then the evaluation with the points it chose.

    `pool` is a `study.pool.Pool` or another launcher's.

    Raises:
        UsageError: when an arm's every tuning run failed.
        KeyboardInterrupt: after Ctrl-C, when the runs have stopped.
    """
    with pool:
        while not study.trials:
            _train(pool, study.tuning, done)
            _advance(study)
        for level in _levels(study.recipe):
            trials = [t for t in study.trials if t.arm in level]
            for trial in trials:
                _locate(study, trial)
            _train(pool, trials, done)


def settle(study: Study) -> None:
    """Fill in what follows from the runs that are there, without training: where the tuning is
    complete, its choice and the evaluation runs."""
    while not study.trials and not any(trial.missing() for trial in study.tuning):
        _advance(study)


def check_metrics(study: Study) -> None:
    """Refuse a metric that the runs will not have, before anything trains.

    Raises:
        UsageError: naming the claim's line and the nearest metric.
    """
    wanted = {study.recipe.metric}
    for claim in study.recipe.claims:
        wanted |= {t.metric for t in (claim.left, claim.right) if t.metric}
    wanted -= set(BUILT_IN)
    # What callbacks and post steps record shows only in a run.
    wanted = {name for name in wanted if not name.startswith(("post/", "probe/"))}
    trials = [*study.tuning, *study.trials]
    known = {name for trial in trials for name in trial.summary.get("metrics", {})}
    missing = wanted - known
    if missing and any(trial.answer is None for trial in trials):
        known |= _evaluated(trials[0].config)
        missing -= known
    if missing:
        name = min(missing)
        line = _line_of(study.recipe, name)
        hint = nearest(name, [*known, *BUILT_IN])
        raise UsageError(f"{study.recipe.path}:{line}: no metric '{name}'{hint}")


def conclude(study: Study) -> None:
    """Fill in the verdicts, corrected by Holm where there are several claims."""
    found: list[tuple[Claim, Verdict | None, str]] = []
    analysed = functools.cache(functools.partial(_analysed, study))
    for claim in study.recipe.claims:
        left, right = (_by_seed(study, term, analysed) for term in (claim.left, claim.right))
        common = [s for s in study.seeds if s in left and s in right]
        lost = len(study.seeds) - len(common)
        note = f"{lost} of {len(study.seeds)} seeds have no value" if lost else ""
        if len(common) < 2:
            found.append((claim, None, note or "fewer than two seeds"))
            continue
        direction = "lower" if claim.below else "higher"
        found.append((claim, judge(left, right, direction=direction, margin=claim.margin), note))
    judged = [verdict for _, verdict, _ in found if verdict is not None]
    if len(judged) > 1:
        corrected = iter(holm([verdict.p for verdict in judged]))
        found = [(c, v and v.corrected(next(corrected)), note) for c, v, note in found]
    study.verdicts = found


def overall(study: Study) -> str:
    """One verdict of all claims: contradicted if any is, reproduced if all are."""
    outcomes = {verdict.outcome if verdict else "inconclusive" for _, verdict, _ in study.verdicts}
    if "contradicted" in outcomes:
        return "contradicted"
    return "reproduced" if outcomes == {"reproduced"} else "inconclusive"


def by_arm(study: Study) -> dict[str, dict[int, float]]:
    """The recipe's metric by arm and seed, where there is a value."""
    return {arm: _values(study, arm, study.recipe.metric) for arm in study.recipe.arms}


def result(study: Study) -> dict[str, Any]:
    """What `--json` prints and `--record` keeps."""
    claims = []
    for claim, verdict, note in study.verdicts:
        row: dict[str, Any] = {"claim": claim.text, "verdict": "inconclusive", "note": note}
        if verdict is not None:
            row |= {
                "verdict": verdict.outcome,
                "effect": verdict.mean,
                "interval": [verdict.interval.low, verdict.interval.high],
                "t_interval": [verdict.t_interval.low, verdict.t_interval.high],
                "standardised_effect": verdict.effect,
                "p": verdict.p,
                "seeds": verdict.seeds,
                "further_seeds": verdict.further_seeds,
            }
        else:
            row |= {"effect": None, "interval": None}
        claims.append(row)
    return {
        "recipe": study.recipe.name,
        "verdict": overall(study),
        "claims": claims,
        "chosen": {arm: list(point) for arm, point in study.chosen.items()},
        "tuning": [_row(trial) for trial in study.tuning],
        "runs": [_row(trial) for trial in study.trials],
    }


def _row(trial: Trial) -> dict[str, Any]:
    summary = trial.summary
    return {
        "arm": trial.arm,
        "seed": trial.seed,
        "overrides": trial.overrides,
        "address": address(trial.config),
        "run_dir": summary.get("run_dir"),
        "status": summary.get("status", "failed"),
        "reason": trial.missing(),
        "metrics": trial.values(),
    }


def _trial(
    study: Study, arm: Arm, seed: int, point: tuple[str, ...], tuning: bool = False
) -> Trial:
    recipe = study.recipe
    name = f"{recipe.name}-{arm.name}-{'tune-' if tuning else ''}s{seed}"
    overrides = [
        *(*recipe.base, *arm.overrides, *point),
        *(f"seed={seed}", f"name={name}", f"outputs={study.outputs}"),
    ]
    if "tracker=none" not in overrides:
        overrides.append(f"tracker.group={recipe.name}")

    def folder(needed: str) -> str:
        before = _trial(study, recipe.arms[needed], seed, study.chosen.get(needed, ()))
        return str(existing_or_planned(before))

    for key, needed in arm.runs.items():
        several = isinstance(needed, list)
        told = f"[{','.join(map(folder, needed))}]" if several else folder(needed)
        overrides.append(f"{key}={told}")
    return Trial(arm.name, seed, overrides, compose(overrides), point, tuning)


def _locate(study: Study, trial: Trial) -> None:
    """Name the folders of the runs a trial starts from as they are now: another process may have
    trained them under another recipe's name since it was planned."""
    arm = study.recipe.arms[trial.arm]
    if trial.answer is None and arm.runs:
        now = _trial(study, arm, trial.seed, trial.point)
        trial.overrides, trial.config, trial.answer = now.overrides, now.config, cached(now)


def existing_or_planned(trial: Trial) -> Path:
    """Where the run's folder is or will be."""
    folders = existing(trial.config)
    name = f"{trial.config['name']}-{address(trial.config)}"
    return folders[0] if folders else Path(trial.config["outputs"]) / "runs" / name


def _evaluation(study: Study) -> list[Trial]:
    return [
        _trial(study, arm, seed, study.chosen[arm.name])
        for arm in study.recipe.arms.values()
        for seed in study.seeds
    ]


def _advance(study: Study) -> None:
    """From the tuning so far, the points of its arms, and what comes next: the tuning of the arms
    that start from these, or the evaluation runs."""
    for level in _levels(study.recipe):
        if not any(trial.arm in level for trial in study.tuning):
            _plan_tuning(study, level)
            return
        study.chosen |= {arm: _best(study, arm) for arm in level if arm not in study.chosen}
    study.trials = _evaluation(study)
    for trial in study.trials:
        trial.answer = cached(trial)


def _plan_tuning(study: Study, level: list[str]) -> None:
    """Add the tuning runs of arms, whose starting arms have been tuned."""
    for name in level:
        for point in points(study.recipe):
            for seed in study.recipe.tuning.seeds:
                trial = _trial(study, study.recipe.arms[name], seed, point, tuning=True)
                trial.answer = cached(trial)
                study.tuning.append(trial)


def _levels(recipe: Recipe) -> list[list[str]]:
    """Arms in the order their stages allow."""
    levels: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(recipe.arms):
        level = [
            a.name for a in recipe.arms.values() if a.name not in done and done.issuperset(a.before)
        ]
        levels.append(level)
        done |= set(level)
    return levels


def _train(pool: Any, trials: list[Trial], done: Done) -> None:
    # Arms that are equal under two names are one run.
    waiting: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.answer is None:
            waiting.setdefault(address(trial.config), []).append(trial)
    groups = list(waiting.values())
    # Seed by seed, so that an interrupted study has whole pairs.
    groups.sort(key=lambda group: group[0].seed)
    count = 0

    def ended(number: int, answer: Answer) -> None:
        nonlocal count
        count += 1
        for trial in groups[number]:
            trial.answer = answer
        done(groups[number][0], count, len(groups))

    pool.run([group[0].overrides for group in groups], ended)


def _best(study: Study, arm: str) -> tuple[str, ...]:
    """The point whose mean metric over the tuning seeds is best; one that diverged is not."""
    sign = 1 if study.recipe.direction == "lower" else -1
    scores = {}
    for point in points(study.recipe):
        trials = [t for t in study.tuning if t.arm == arm and t.point == point]
        values = [t.values().get(study.recipe.metric, math.nan) for t in trials]
        if all(math.isfinite(v) for v in values) and not any(
            t.values()["diverged"] for t in trials
        ):
            scores[point] = sign * plain.fmean(values)
    if not scores:
        trial = next(t for t in study.tuning if t.arm == arm)
        reason = trial.missing() or "diverged"
        raise UsageError(f"arm '{arm}': no tuning run gave {study.recipe.metric}: {reason}")
    return min(scores, key=lambda point: scores[point])


def _by_seed(
    study: Study, term: Term, analysed: Callable[[str], dict[str, Any]]
) -> dict[int, float]:
    """A term's value for every seed that has one."""
    if term.number is not None:
        return dict.fromkeys(study.seeds, term.number)
    if term.analysis is not None:
        return _of_analysis(study, term, analysed(term.analysis))
    if term.arm is None:  # the ratio of the second arm to the first
        first, second = study.recipe.arms
        assert term.metric is not None
        below = _values(study, first, term.metric)
        above = _values(study, second, term.metric)
        return {s: above[s] / below[s] for s in above if below.get(s)}
    assert term.metric is not None
    return _values(study, term.arm, term.metric)


def _values(study: Study, arm: str, metric: str) -> dict[int, float]:
    found = {t.seed: t.values() for t in study.trials if t.arm == arm}
    return {
        seed: values[metric]
        for seed, values in found.items()
        if metric in values and (metric in BUILT_IN or not values["diverged"])
    }


def table(study: Study) -> list[dict[str, Any]]:
    """The evaluation runs, as `study.analyses` describes them."""
    return [
        {**_row(trial), "config": trial.config, "lines": _metric_lines(trial)}
        for trial in study.trials
    ]


def _analysed(study: Study, name: str) -> dict[str, Any]:
    """What an analysis gives, for all claims about it."""
    where = f"{study.recipe.path}: analyses.{name}"
    return call(factory(study.recipe.analyses[name], where), where, table(study))


def _of_analysis(study: Study, term: Term, found: dict[str, Any]) -> dict[int, float]:
    if term.key not in found:
        hint = nearest(str(term.key), found)
        raise UsageError(
            f"{study.recipe.path}: analysis {term.analysis} gives no '{term.key}'{hint}"
        )
    value = found[term.key]
    return value if isinstance(value, dict) else dict.fromkeys(study.seeds, float(value))


def _metric_lines(trial: Trial) -> list[dict[str, Any]]:
    return read_lines(trial.folder / "metrics.jsonl") if trial.folder else []


def _evaluated(config: Config) -> set[str]:
    from training.assemble import assemble
    from training.evaluate import evaluate

    return {"train/loss", "grad_norm", "lr", *evaluate(assemble(config), samples=1)}


def _line_of(recipe: Recipe, text: str) -> int:
    lines = recipe.path.read_text().splitlines()
    return next((i for i, line in enumerate(lines, 1) if text in line), 1)


def written(value: Any) -> str:
    """A value of the tuning grid as an override has it."""
    return json.dumps(value) if isinstance(value, list | bool) or value is None else str(value)
