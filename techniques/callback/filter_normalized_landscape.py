"""The loss around the weights that a run ends with, along directions scaled filter by filter."""

import time
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from study import probe_figures
from study.probes import moving
from techniques.callback import probing
from training.parallel import like, local, whole

if TYPE_CHECKING:
    from training.run import Run

NORMS = ("filter", "none")


class FilterNormalizedLandscape:
    """After the last step, keeps the loss on a grid around the weights θ,

        L(θ + a·d) or L(θ + a·d + b·e),   d_i ← ‖θ_i‖ / (‖d_i‖ + 1e-10) · d_i   for every filter i,

    with d and e Gaussian and a, b from −`span` to `span`. A filter is what makes one output: a row
    of a linear layer, an output channel of a convolution. Biases and the parameters of norms, all
    that have one dimension, stay: d is 0 there. So a network whose layers are rescaled without
    changing what it computes has the same landscape, which with `normalise: none` it has not.

    The loss is the task's mean loss, without penalties, over evenly spaced training samples, the
    model in evaluation mode, batch norms with their running statistics. Grid, losses and seconds
    are in `probes/<name>.npz` of the run's folder, the picture is `probes/<name>.png`. Recorded are
    three numbers, the last two of which are ours, as the authors look at pictures:

        probe/<name>_loss     L(θ)
        probe/<name>_basin    share of the grid's points where the loss is at most L(θ) + `rise`
        probe/<name>_concave  share of the grid's inner points where the second difference along an
                              axis is negative by more than 10⁻⁶ of its terms' sizes; convex: 0

    A measurement costs `draws` · `points`^`dimensions` + 1 forwards of `samples` samples, no
    backward, and 2 + `dimensions` copies of the weights; other steps cost nothing. It leaves no
    trace in the run. A finished run gets one with `trainer.start_from=RUN trainer.max_steps=0`.

    Args:
        dimensions: 1 for lines, 2 for planes.
        points: of each axis.
        span: of each axis, from −`span` to `span`.
        draws: lines or planes, with directions of their own; numbers are of all of them.
        samples: of the training set, all in one batch.
        normalise: "filter", or "none" for plain Gaussian directions.
        rise: of the loss within the basin.
        seed: of the directions.
        name: of files and metrics.

    Raises:
        ValueError: for a value out of its range.

    Source: "Visualizing the Loss Landscape of Neural Nets", arXiv 1712.09913;
    https://github.com/tomgoldstein/loss-landscape, `net_plotter.py` (`normalize_direction`,
    `normalize_directions_for_weights`, `xignore=biasbn`) and for span and points, the authors'
    -1:1:51, `plot_surface.py`.
    """

    def __init__(
        self,
        dimensions: int = 2,
        points: int = 51,
        span: float = 1.0,
        draws: int = 1,
        samples: int = 512,
        normalise: str = "filter",
        rise: float = 1.0,
        seed: int = 0,
        name: str = "landscape",
    ) -> None:
        if dimensions not in (1, 2):
            raise ValueError(f"dimensions: expected 1 or 2, got {dimensions}")
        for key, count, least in (
            ("points", points, 3),
            ("draws", draws, 1),
            ("samples", samples, 1),
        ):
            if count < least:
                raise ValueError(f"{key}: must be at least {least}, got {count}")
        for key, value in {"span": span, "rise": rise}.items():
            if value <= 0:
                raise ValueError(f"{key}: must be positive, got {value}")
        if normalise not in NORMS:
            raise ValueError(f"normalise: one of {', '.join(NORMS)}, got '{normalise}'")
        self.dimensions, self.points, self.span, self.draws = dimensions, points, span, draws
        self.samples, self.normalise, self.rise = samples, normalise, rise
        self.seed, self.name = seed, name

    @torch.no_grad()
    def on_eval_end(self, run: "Run") -> None:
        """Measure when training is over."""
        if run.step < run.max_steps:
            return
        started = time.monotonic()
        batch = probing.training_batch(run, self.samples)
        axis = np.linspace(-self.span, self.span, self.points)
        trained = {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(self.seed)
        centre = moving.loss_of(run, batch)
        planes = []
        with moving.movable(run) as parameters:
            for _ in range(self.draws):
                axes = [
                    directions(trained, generator, self.normalise) for _ in range(self.dimensions)
                ]
                found = surface(parameters, axes, axis, lambda: moving.loss_of(run, batch))
                planes.append(np.reshape(found, [self.points] * self.dimensions))
        losses = np.stack(planes)
        run.record(
            {
                f"probe/{self.name}_loss": centre,
                f"probe/{self.name}_basin": float((losses <= centre + self.rise).mean()),
                f"probe/{self.name}_concave": concave(losses),
            }
        )
        drawn = probe_figures.landscapes({run.config["name"]: [(axis, losses)]})
        seconds = time.monotonic() - started
        moving.keep(run, self.name, drawn, axis=axis, losses=losses, seconds=seconds)


def directions(
    parameters: dict[str, Tensor], generator: torch.Generator, normalise: str = "filter"
) -> dict[str, Tensor]:
    """A random direction for each parameter, this process's part; 0 where it has one dimension."""
    found = {}
    for name, parameter in parameters.items():
        weight = whole(parameter)
        drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
        if weight.ndim <= 1:
            drawn.zero_()
        elif normalise == "filter":
            rows, filters = drawn.flatten(1), weight.flatten(1)
            rows.mul_(filters.norm(dim=1, keepdim=True) / (rows.norm(dim=1, keepdim=True) + 1e-10))
        found[name] = local(like(drawn, parameter))
    return found


def surface(
    parameters: dict[str, Tensor],
    axes: list[dict[str, Tensor]],
    axis: np.ndarray,
    loss: Callable[[], float],
) -> list[float]:
    """The loss with the parameters at every point of the grid, the last axis fastest; they are put
    back."""
    moved = list(parameters.values())
    start = [p.clone() for p in moved]
    found = []
    for point in product(axis, repeat=len(axes)):
        torch._foreach_copy_(moved, start)
        for distance, direction in zip(point, axes):
            torch._foreach_add_(moved, [direction[n] for n in parameters], alpha=float(distance))
        found.append(loss())
    torch._foreach_copy_(moved, start)
    return found


def concave(losses: np.ndarray, tolerance: float = 1e-6) -> float:
    """Share of inner points of all lines along the axes of `losses` (draws, points[, points]) whose
    second difference is negative by more than `tolerance` of the sum of its terms' sizes."""
    signs = []
    for axis in range(1, losses.ndim):
        line = np.moveaxis(losses, axis, -1)
        second = line[..., 2:] - 2 * line[..., 1:-1] + line[..., :-2]
        size = np.abs(line[..., 2:]) + 2 * np.abs(line[..., 1:-1]) + np.abs(line[..., :-2])
        signs.append((second < -tolerance * size).ravel())
    return float(np.concatenate(signs).mean())
