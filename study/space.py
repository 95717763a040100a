"""A sweep's space, from Hydra's own grammar."""

from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from training.errors import UsageError

Space = dict[str, BaseDistribution]


def split(overrides: list[str]) -> tuple[list[str], Space]:
    """Overrides that are the same for all trials, and the distributions of the others.

    `key=a,b` and `choice(a,b)` are choices, `range(1,9,2)` steps, `interval(1e-4,1e-2)` real
    numbers, `int(interval(32,128))` whole ones, `tag(log,interval(...))` even in the logarithm.

    Raises:
        UsageError: for what Hydra does not parse, or a space that is empty.
    """
    fixed: list[str] = []
    space: Space = {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise UsageError(f"'{text}' is not understood: {str(error).splitlines()[0]}") from error
        if override.is_sweep_override():
            space[str(override.key_or_group)] = _distribution(override, text)
        else:
            fixed.append(text)
    if not space:
        raise UsageError(
            "nothing to sweep: give some key several values, as optimizer.lr=1e-4,3e-4"
        )
    return fixed, space


def grid(space: Space) -> list[dict[str, Any]]:
    """Every point of a space of choices and steps, the last key changing fastest.

    Raises:
        UsageError: for an interval, which has no points.
    """
    points: list[dict[str, Any]] = [{}]
    for key, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            values = list(distribution.choices)
        elif isinstance(distribution, IntDistribution | FloatDistribution) and _steps(distribution):
            assert distribution.step is not None
            count = round((distribution.high - distribution.low) / distribution.step) + 1
            values = [distribution.low + i * distribution.step for i in range(count)]
        else:
            raise UsageError(f"--sampler grid: {key} is an interval; use random, tpe or cmaes")
        points = [point | {key: value} for point in points for value in values]
    return points


def written(point: dict[str, Any]) -> list[str]:
    """A point as overrides."""
    return [f"{key}={value}" for key, value in point.items()]


def dumped(space: Space) -> dict[str, str]:
    """The space as JSON text by key."""
    return {k: optuna.distributions.distribution_to_json(d) for k, d in space.items()}


def loaded(texts: dict[str, str]) -> Space:
    """The space from `dumped`."""
    return {k: optuna.distributions.json_to_distribution(text) for k, text in texts.items()}


def _distribution(override: Override, text: str) -> BaseDistribution:
    value: Any = override.value()
    try:
        if isinstance(value, IntervalSweep):
            log = "log" in value.tags
            low, high = value.start, value.end
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=log)
            return FloatDistribution(float(low), float(high), log=log)  # type: ignore[arg-type]
        if isinstance(value, RangeSweep):
            values = list(override.sweep_iterator())
            low, step = values[0], value.step
            kind = IntDistribution if isinstance(low, int) else FloatDistribution
            return kind(low, values[-1], step=step)  # type: ignore[arg-type]
        choices = [str(v) for v in override.sweep_iterator(transformer=Transformer.encode)]
        return CategoricalDistribution(choices)
    except (ValueError, IndexError, HydraException) as error:
        raise UsageError(f"'{text}': {str(error).splitlines()[0]}") from error


def _steps(distribution: IntDistribution | FloatDistribution) -> bool:
    if isinstance(distribution, IntDistribution):
        return distribution.step > 1 or distribution.high - distribution.low < 10_000
    return distribution.step is not None
