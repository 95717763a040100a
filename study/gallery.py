"""Curves with their derivatives, as a picture and in the terminal."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from study.plots import COLOURS, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Curve:
    """A function of one number: its values and slopes at `x`, the part of their axis that is drawn,
    numbers that go with it, and what is written beside it."""

    name: str
    x: np.ndarray
    y: np.ndarray
    slope: np.ndarray
    low: float
    high: float
    numbers: dict[str, float]
    about: str


def draw(curves: list[Curve], caption: str, columns: int = 6) -> "Figure":
    """A panel for each: the function (thick), its derivative (thin), and what goes with it."""
    rows = math.ceil(len(curves) / columns)
    drawn = figure(2.1 * columns, 1.75 * rows)
    for number, own in enumerate(curves):
        axes = drawn.add_subplot(rows, columns, number + 1)
        axes.axhline(0, color=COLOURS[6], lw=0.5)
        axes.axvline(0, color=COLOURS[6], lw=0.5)
        axes.plot(own.x, own.slope, color=COLOURS[1], lw=1)
        axes.plot(own.x, own.y, color=COLOURS[0], lw=2)
        axes.set_ylim(own.low, own.high)
        axes.set_xticks([round(own.x[0], 2), 0, round(own.x[-1], 2)])
        axes.locator_params(axis="y", nbins=5)
        axes.tick_params(labelsize=6)
        axes.set_title(own.name, fontsize=8, fontweight="bold", pad=2)
        axes.set_xlabel(own.about, fontsize=6, labelpad=1)
    drawn.suptitle(caption, fontsize=9)
    return drawn


def braille(values: np.ndarray, width: int, height: int, low: float, high: float) -> list[str]:
    """A curve as lines of braille characters, each 2 dots wide and 4 high; what is outside
    [low, high] is left out."""
    places = np.linspace(0, len(values) - 1, 2 * width).round().astype(int)
    rows = (high - values[places]) / (high - low) * (4 * height - 1)
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    cells = np.zeros((height, width), int)
    for column, row in enumerate(rows.round()):
        if np.isfinite(row) and 0 <= row < 4 * height:
            place = int(row)
            cells[place // 4, column // 2] |= bits[place % 4, column % 2]
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]
