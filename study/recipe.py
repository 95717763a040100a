"""Recipes: a paper's claim as arms, seeds and comparisons, read from `recipes/<name>.yaml`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from training.components import factory
from training.configs import card, options
from training.errors import UsageError, nearest

RECIPES = Path(__file__).parent.parent / "recipes"
KEYS = {
    **{"paper": str, "base": list, "arms": dict, "tune": dict, "seeds": list, "metric": str},
    **{"direction": str, "claims": list, "analyses": dict, "figures": dict, "profiles": dict},
    **{"notes": str, "reported": str},
}
STAGES = {"from": "trainer.start_from", "teacher": "++callbacks.teacher.of"}
"""Keys of an arm that name another one, and the configuration key that is told its run's folder."""
REQUIRED = ("paper", "arms", "seeds", "claims")
TERM = re.compile(
    r"(?P<number>[-+]?\d+(\.\d+)?(e[-+]?\d+)?)|ratio\((?P<ratio>[\w/.-]+)\)"
    r"|(?P<metric>[\w/.-]+)\((?P<of>[\w-]+)\)|(?P<arm>[\w-]+)|(?P<analysis>\w+)\.(?P<key>\w+)"
)


@dataclass(frozen=True)
class Term:
    """One side of a claim: a `number`, a `metric` of an `arm`, the ratio of a metric between the
    two arms (`arm` is None), or the `key` of an `analysis`."""

    number: float | None = None
    metric: str | None = None
    arm: str | None = None
    analysis: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class Claim:
    """`left` is below (`<`) or above (`>`) `right`, by more than `margin`."""

    text: str
    left: Term
    right: Term
    below: bool
    margin: float = 0.0


@dataclass(frozen=True)
class Arm:
    """Overrides, and by configuration key the arm, or list of arms, whose run's folder it is."""

    name: str
    overrides: tuple[str, ...]
    runs: dict[str, str | list[str]] = field(default_factory=dict)

    @property
    def before(self) -> tuple[str, ...]:
        """The arms that must have been trained."""
        return tuple(arm for named in self.runs.values() for arm in _several(named))


@dataclass(frozen=True)
class Tuning:
    """The grid every arm is tuned on, and its seeds, which are not those of the evaluation."""

    grid: dict[str, list[Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """What `recipes/<name>.yaml` says; `path` is where errors point."""

    name: str
    path: Path
    profile: str
    paper: str
    base: tuple[str, ...]
    arms: dict[str, Arm]
    tuning: Tuning
    seeds: tuple[int, ...]
    metric: str
    direction: str
    claims: tuple[Claim, ...]
    analyses: dict[str, Any]
    figures: dict[str, Any]
    reported: str
    notes: str


def names() -> list[str]:
    """All recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def is_path(name: str) -> bool:
    """Whether a recipe is given by its path."""
    return name.endswith((".yaml", ".yml"))


def read(name: str, profile: str = "small") -> Recipe:
    """A recipe by its name, or a file by its path.

    Args:
        profile: `"small"`, the recipe's own keys, or one of its `profiles`, which replaces some.

    Raises:
        UsageError: naming file and line, for whatever is wrong in it.
    """
    path = Path(name) if is_path(name) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(f"recipe: no '{name}'{nearest(name, names())}")
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.CSafeLoader)
        content = yaml.load(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or "no YAML"
        raise UsageError(f"{path}:{line}: {problem}") from error
    return _Reader(path, node).recipe(content, profile)


def chosen_seeds(recipe: Recipe, wanted: int | None) -> tuple[int, ...]:
    """The recipe's first seeds, and where more are wanted the next numbers that are free."""
    if wanted is None:
        return recipe.seeds
    own, taken = recipe.seeds, recipe.tuning.seeds
    more = (s for s in range(max(own) + 1, 2**31) if s not in taken)
    return (*own, *(next(more) for _ in range(wanted - len(own))))[:wanted]


class _Reader:
    """Checks a recipe key by key; errors name the line."""

    def __init__(self, path: Path, node: Any) -> None:
        self.path, self.lines = path, dict(_lines(node))

    def fail(self, at: tuple[str | int, ...], message: str) -> UsageError:
        while at and at not in self.lines:
            at = at[:-1]
        return UsageError(f"{self.path}:{self.lines.get(at, 1)}: {message}")

    def recipe(self, content: Any, profile: str) -> Recipe:
        if not isinstance(content, dict):
            raise self.fail((), "a recipe is a mapping of keys")
        self._check_keys(content, ())
        profiles = content.get("profiles") or {}
        prefix: dict[str, tuple[str | int, ...]] = {key: (key,) for key in content}
        if profile != "small":
            if profile not in profiles:
                hint = nearest(profile, ["small", *profiles])
                raise self.fail(("profiles",), f"--profile: no '{profile}'{hint}")
            changed = profiles[profile]
            self._check_keys(changed, ("profiles", profile))
            content = content | changed
            prefix |= {key: ("profiles", profile, key) for key in changed}
        self.prefix = prefix
        for key in REQUIRED:
            if not content.get(key):
                raise self.fail((), f"'{key}' is missing")
        arms = self._arms(content["arms"])
        metric = content.get("metric", "val/loss")
        direction = content.get("direction", "lower")
        if direction not in ("lower", "higher"):
            raise self.fail(self._at("direction"), f"direction: lower or higher, not {direction!r}")
        analyses, figures = (self._functions(content, key) for key in ("analyses", "figures"))
        claims = tuple(
            self._claim(text, i, arms, analyses, metric) for i, text in enumerate(content["claims"])
        )
        tuning = self._tuning(content.get("tune") or {})
        seeds = self._seeds(content["seeds"], "seeds")
        if set(seeds) & set(tuning.seeds):
            raise self.fail(self._at("tune"), "tune.seeds: must not be those of the evaluation")
        return Recipe(
            name=self.path.stem,
            path=self.path,
            profile=profile,
            paper=str(content["paper"]),
            base=self._overrides(content.get("base") or [], "base"),
            arms=arms,
            tuning=tuning,
            seeds=seeds,
            metric=metric,
            direction=direction,
            claims=claims,
            analyses=analyses,
            figures=figures,
            reported=content.get("reported") or _card_claim(self.path.stem),
            notes=content.get("notes", ""),
        )

    def _at(self, key: str, *rest: str | int) -> tuple[str | int, ...]:
        return (*self.prefix.get(key, (key,)), *rest)

    def _check_keys(self, content: Any, at: tuple[str | int, ...]) -> None:
        if not isinstance(content, dict):
            raise self.fail(at, "expected a mapping of keys")
        for key, value in content.items():
            if key not in KEYS:
                raise self.fail((*at, key), f"no key '{key}'{nearest(str(key), KEYS)}")
            if not isinstance(value, KEYS[key]):
                kinds = {str: "text", list: "a list", dict: "a mapping"}
                raise self.fail((*at, key), f"{key}: expected {kinds[KEYS[key]]}")

    def _overrides(self, given: Any, *at: str | int) -> tuple[str, ...]:
        where = self._at(str(at[0]), *at[1:])
        if not isinstance(given, list) or not all(isinstance(o, str) and "=" in o for o in given):
            raise self.fail(where, f"{'.'.join(map(str, at))}: expected a list of key=value")
        return tuple(given)

    def _arms(self, given: dict[str, Any]) -> dict[str, Arm]:
        arms = {}
        for name, body in given.items():
            if not re.fullmatch(r"[A-Za-z_][\w-]*", str(name)):
                raise self.fail(self._at("arms", name), f"arms: '{name}' is no name")
            runs, overrides = {}, body
            if isinstance(body, dict):
                wrong = set(body) - {*STAGES, "runs", "overrides"}
                if wrong:
                    hint = nearest(min(wrong), (*STAGES, "runs", "overrides"))
                    raise self.fail(self._at("arms", name), f"arms.{name}: '{min(wrong)}'{hint}")
                runs = self._runs(name, body, given)
                overrides = body.get("overrides") or []
            arms[str(name)] = Arm(str(name), self._overrides(overrides, "arms", name), runs)
        for arm in arms.values():
            self._check_stages([arm.name], arms)
        return arms

    def _runs(
        self, name: str, body: dict[str, Any], arms: dict[str, Any]
    ) -> dict[str, str | list[str]]:
        """By configuration key the arms whose runs an arm is told."""
        at, named = self._at("arms", name), body.get("runs") or {}
        if not isinstance(named, dict):
            raise self.fail((*at, "runs"), f"arms.{name}.runs: expected arms by configuration key")
        stages = {key: body[key] for key in STAGES if body.get(key) is not None}
        for key, given in (stages | named).items():
            for arm in _several(given):
                if arm not in arms:
                    raise self.fail(at, f"{key}: no arm '{arm}'{nearest(str(arm), arms)}")
        return {STAGES[key]: arm for key, arm in stages.items()} | named

    def _check_stages(self, seen: list[str], arms: dict[str, Arm]) -> None:
        """Refuse an arm that needs itself to have been trained."""
        for before in arms[seen[-1]].before:
            if before in seen:
                circle = " -> ".join([*seen, before])
                raise self.fail(self._at("arms", seen[0]), f"stages go in a circle: {circle}")
            self._check_stages([*seen, before], arms)

    def _functions(self, content: dict[str, Any], key: str) -> dict[str, Any]:
        nodes = content.get(key) or {}
        for name, node in nodes.items():
            at = self._at(key, name)
            if not isinstance(node, dict) or "_target_" not in node:
                raise self.fail(at, f"{key}.{name}: needs a _target_")
            try:
                factory(node, f"{key}.{name}")
            except UsageError as error:
                raise self.fail(at, str(error)) from error
        return nodes

    def _seeds(self, given: Any, *at: str) -> tuple[int, ...]:
        whole = isinstance(given, list) and all(type(s) is int and s >= 0 for s in given)
        if not whole or len(set(given)) != len(given) or not given:
            raise self.fail(self._at(*at), f"{'.'.join(at)}: expected different whole numbers")
        return tuple(given)

    def _tuning(self, given: dict[str, Any]) -> Tuning:
        if not given:
            return Tuning()
        wrong = set(given) - {"grid", "seeds"}
        if wrong or set(given) != {"grid", "seeds"}:
            raise self.fail(self._at("tune"), "tune: has exactly the keys grid and seeds")
        grid = given["grid"]
        if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
            raise self.fail(self._at("tune", "grid"), "tune.grid: expected lists of values by key")
        return Tuning(grid, self._seeds(given["seeds"], "tune", "seeds"))

    def _claim(
        self, text: Any, i: int, arms: dict[str, Arm], analyses: dict[str, Any], metric: str
    ) -> Claim:
        at = self._at("claims", i)
        found = re.fullmatch(r"(.+?)\s*([<>])\s*(.+?)(?:\s+by\s+(\S+))?", str(text).strip())
        if not found:
            raise self.fail(at, f"claim '{text}': expected `left < right` or `left > right`")
        try:
            margin = float(found[4] or 0)
        except ValueError:
            raise self.fail(at, f"claim '{text}': '{found[4]}' is no number") from None
        sides = [self._term(found[k], text, at, arms, analyses, metric) for k in (1, 3)]
        if sides[0].number is not None and sides[1].number is not None:
            raise self.fail(at, f"claim '{text}': names no arm")
        return Claim(str(text), sides[0], sides[1], found[2] == "<", margin)

    def _term(
        self,
        side: str,
        text: Any,
        at: tuple[str | int, ...],
        arms: dict[str, Arm],
        analyses: dict[str, Any],
        metric: str,
    ) -> Term:
        found = TERM.fullmatch(side)
        if not found:
            raise self.fail(at, f"claim '{text}': '{side}' is not understood")
        if found["number"]:
            return Term(number=float(side))
        if found["ratio"]:
            if len(arms) != 2:
                raise self.fail(at, f"claim '{text}': a ratio needs exactly two arms")
            return Term(metric=found["ratio"])
        if found["analysis"]:
            if found["analysis"] not in analyses:
                hint = nearest(found["analysis"], analyses)
                raise self.fail(at, f"claim '{text}': no analysis '{found['analysis']}'{hint}")
            return Term(analysis=found["analysis"], key=found["key"])
        arm = found["of"] or found["arm"]
        if arm not in arms:
            raise self.fail(at, f"claim '{text}': no arm '{arm}'{nearest(arm, arms)}")
        return Term(metric=found["metric"] or metric, arm=arm)


def _several(arms: str | list[str]) -> list[str]:
    return arms if isinstance(arms, list) else [arms]


def _card_claim(name: str) -> str:
    """The claim on the card of the technique that a recipe is named after, if there is one."""
    return card(name)["claim"] if name in options("technique") else ""


def _lines(node: Any, at: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], int]]:
    """The line each key and list entry begins on, by its path."""
    found = [(at, node.start_mark.line + 1)] if node is not None else []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, key.value)
            found += [*_lines(value, here), (here, key.start_mark.line + 1)]
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            found += _lines(value, (*at, i))
    return found
