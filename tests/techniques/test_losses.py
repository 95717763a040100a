"""What the cards and docstrings of losses say, held to."""

import inspect
import math
import re

import numpy as np
import pytest
import torch

from study.losses import AGAINST, least, losses, measure
from training.catalog import targets
from training.components import target
from training.configs import card, options, overlay

SATURATED = 1e4
TECHNIQUES = [n for n in options("technique") if card(n)["slot"] == "task.loss"]
DRAWN = losses()


@pytest.mark.parametrize("name", TECHNIQUES)
def test_each_says_what_it_is_a_function_of(name):
    curve = card(name)["curve"]
    assert set(curve) == {"none"} or curve["against"] in AGAINST
    documented = inspect.getdoc(target(overlay(name)["task"]["loss"], "task.loss")).lower()
    for said in (
        "minimi|is least|reached where",
        "range|0, ∞|at least|from|below",
        "saturat|far",
    ):
        assert re.search(said, documented), f"{name}: its docstring does not say '{said}'"
    assert targets(name)


@pytest.mark.parametrize("name", [n for n in DRAWN if n in TECHNIQUES])
def test_range_and_minimum_are_as_the_card_says(name):
    against, loss = DRAWN[name]
    curve, reach = card(name)["curve"], AGAINST[against][1]
    x = np.linspace(-reach, reach, 61)
    y, _ = measure(loss, against, x)
    low, high = curve["range"]
    assert np.isfinite(y).all()
    assert (y >= low - 1e-9).all()
    assert (y <= high + 1e-9).all()
    assert least(y, x, against) == pytest.approx(curve["minimum"], abs=1e-6)


@pytest.mark.parametrize("name", DRAWN)
def test_saturated_logits_give_no_nan(name):
    """Value and gradient at ±1e4; of cosines, of embeddings 1e4 long."""
    against, loss = DRAWN[name]
    loss = loss.double() if isinstance(loss, torch.nn.Module) else loss
    places = (-1.0, 0.0, 1.0) if against == "cosine" else (-SATURATED, SATURATED)
    for dtype in (torch.float64, torch.float32):
        for place in places:
            leaf = torch.tensor(place, dtype=dtype, requires_grad=True)
            outputs, batch = AGAINST[against][0](leaf)
            if against == "cosine":
                outputs["logits"] = outputs["logits"] * SATURATED
            value = loss(outputs, batch).mean()
            (slope,) = torch.autograd.grad(value, leaf)
            assert math.isfinite(value.item())
            assert math.isfinite(slope.item())


@pytest.mark.parametrize(
    "name", [n for n in DRAWN if n in TECHNIQUES and "slopes" in card(n)["curve"]]
)
def test_slopes_at_saturated_logits_are_as_the_card_says(name):
    against, loss = DRAWN[name]
    _, slopes = measure(loss, against, np.array([-SATURATED, SATURATED]))
    assert slopes == pytest.approx(card(name)["curve"]["slopes"], abs=1e-6)
