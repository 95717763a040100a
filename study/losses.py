"""Every loss with its gradient against what it is a function of: a margin, a cosine, an error."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.outputs import Outputs
from study.gallery import Curve
from tasks.losses import cross_entropy, squared_error
from tasks.pairs import infonce
from training.components import component
from training.compose import compose
from training.configs import card, options

CAPTION = (
    "blue: loss, orange: its derivative; against a logit margin (-6 to 6), the "
    "cosine of partners (-1 to 1), or the error of a forecast or of an ensemble's mean (-3 to 3)"
)

Made = tuple[Any, dict[str, Any]]


def margin(m: Tensor) -> Made:
    """One sample of two classes: the right one's logit is m above the other's. That of a
    teacher, and of the model one of two epochs ago, is 1."""
    hidden = torch.stack([torch.zeros_like(m), m])[None]
    classifier = nn.Linear(2, 2, bias=False, dtype=m.dtype)
    nn.init.eye_(classifier.weight)
    classifier.requires_grad_(False)
    other = hidden.new_tensor([[0.0, 1.0]])
    batch = {"labels": torch.ones(1, dtype=torch.long), "teacher_logits": other}
    first = torch.zeros(1, dtype=torch.long)
    past = {"logits_1_ago": other, "known_1_ago": first == 0, "epoch": first + 1, "epochs": 2}
    return Outputs(hidden=hidden, classifier=classifier), batch | past | {"index": first, "part": 0}


def cosine(c: Tensor) -> Made:
    """Two samples of two views each: partners have the cosine c, all others 0."""
    rest = (1 - c.square()).clamp(min=1e-12).sqrt()
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    rows = [(one, zero, zero, zero), (zero, zero, one, zero)]
    rows += [(c, rest, zero, zero), (zero, zero, c, rest)]
    embeddings = torch.stack([torch.stack(row) for row in rows])
    batch = {"labels": torch.tensor([0, 1, 0, 1]), "pixel_values": embeddings}
    return Outputs(logits=embeddings), batch


def error(e: Tensor) -> Made:
    """One forecast that is e above its label, 1."""
    return Outputs(logits=(1 + e).view(1, 1)), {"labels": torch.ones(1, 1, dtype=e.dtype)}


def ensemble(e: Tensor) -> Made:
    """Two forecasts 1 apart, whose mean is e above their label, 1."""
    members = torch.stack([0.5 + e, 1.5 + e]).view(1, 2, 1, 1)
    return Outputs(logits=members), {"labels": torch.ones(1, 1, 1, dtype=e.dtype)}


AGAINST: dict[str, tuple[Callable[[Tensor], Made], float]] = {
    "margin": (margin, 6.0),
    "cosine": (cosine, 0.999),  # at 1 the embedding's direction no longer changes with it
    "error": (error, 3.0),
    "ensemble": (ensemble, 3.0),
}
"""What a loss's card may say it is drawn against, and from minus what to what."""

PLAIN: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "cross-entropy": ("margin", cross_entropy),
    "InfoNCE": ("cosine", infonce),
    "squared error": ("error", squared_error),
}
"""The tasks' own losses."""


def losses() -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """What each is drawn against, and the loss: the plain ones, and every technique of the slot
    `task.loss` whose card says `curve: {against: ...}`."""
    found = dict(PLAIN)
    for name in options("technique"):
        against = card(name).get("curve", {}).get("against")
        if against is not None:
            config = compose([*card(name)["natural"], f"technique={name}"])
            found[name] = against, component(config["task"]["loss"], "task.loss")
    order = list(AGAINST)
    return dict(sorted(found.items(), key=lambda item: order.index(item[1][0])))


def measure_all() -> list[Curve]:
    """`measure` of every loss over the range of what it is drawn against; random numbers, where a
    loss draws any, from seed 0."""
    curves = []
    with torch.random.fork_rng(devices=[]):
        for name, (against, loss) in losses().items():
            reach = AGAINST[against][1]
            x = np.linspace(-reach, reach, 121)
            y, slope = measure(loss, against, x)
            steps = np.quantile(slope, [0.02, 0.98])  # a spike would leave no room for the rest
            low, high = float(min(y.min(), *steps)), float(max(y.max(), *steps))
            place = least(y, x, against)
            pad = 0.05 * (high - low)
            about = f"{against}, least at {place:g}"
            curves.append(Curve(name, x, y, slope, low - pad, high + pad, {"least": place}, about))
    return curves


def measure(loss: Callable[..., Tensor], against: str, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean losses and their derivatives at each of `x`, one at a time, in float64."""
    if isinstance(loss, nn.Module):
        loss = loss.double().train()
    values, slopes = [], []
    for place in x:
        torch.manual_seed(0)
        leaf = torch.tensor(place, dtype=torch.float64, requires_grad=True)
        value = loss(*AGAINST[against][0](leaf)).mean()
        (slope,) = torch.autograd.grad(value, leaf)
        values.append(value.item())
        slopes.append(slope.item())
    return np.array(values), np.array(slopes)


def least(y: np.ndarray, x: np.ndarray, against: str) -> float:
    """Where a loss is least, of many places the outermost; ±∞ at an end of what is drawn, where the
    axis goes on beyond it."""
    best = int(np.flatnonzero(y <= y.min() + 1e-6)[-1])
    ends = {} if against == "cosine" else {0: -math.inf, len(x) - 1: math.inf}
    return ends.get(best, round(float(x[best]), 2) + 0.0)
