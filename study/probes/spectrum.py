"""How the eigenvalues of the Hessian are spread where a run ends."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import eigh_tridiagonal

from study import probe_figures
from study.probes import moving
from study.probes.hessian import hessian_vector_product, twice_differentiable
from tasks.losses import masked_mean
from techniques.callback import probing

if TYPE_CHECKING:
    from training.run import Run

Product = Callable[[np.ndarray], np.ndarray]


class HessianSpectrum:
    """After the last step, keeps the density of the eigenvalues of the training loss's Hessian, by
    stochastic Lanczos quadrature: `order` steps of Lanczos from a random unit vector v give a
    tridiagonal T whose eigenvalues λᵢ and first components squared of eigenvectors wᵢ have
    Σ wᵢ f(λᵢ) ≈ vᵀ f(H) v, exactly for polynomials f of degree below 2·`order`, the mean of which
    over v is tr f(H) / n. The density is Σ wᵢ 𝒩(λ; λᵢ, `variance`·max(1, range of λ)).

    The loss is the task's mean loss, without penalties, over evenly spaced training samples, the
    model in evaluation mode, in the parameters' precision; Lanczos is in float64 and fully
    reorthogonalised. λᵢ, wᵢ, the density and seconds are in `probes/spectrum.npz` of the run's
    folder, the picture is `probes/spectrum.png`. Recorded are

        probe/spectrum_trace     tr H, unbiased: n·Σ wᵢ λᵢ, the mean over draws
        probe/spectrum_largest   the largest λᵢ, and
        probe/spectrum_smallest  the smallest: bounds from inside, close for extreme eigenvalues
        probe/spectrum_negative  Σ wᵢ |λᵢ| over negative λᵢ, of that over all

    A measurement costs one forward and one backward, `draws` · `order` Hessian-vector products of
    about two backwards each, and `order` vectors of the model's size in float64; other steps cost
    nothing. It leaves no trace in the run.

    Args:
        samples: of the training set, all in one batch.
        order: Lanczos steps; 90 as the authors' example.
        draws: starting vectors; 1 as PyHessian's default.
        variance: of the Gaussians; 10⁻⁵ as the authors' default.
        exclude: regular expression, searched in the names of parameters that are held constant.
        seed: of the starting vectors.

    Raises:
        ValueError: for a value out of its range.
        UsageError: at the start, under FSDP2.

    Source: "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density", arXiv
    1901.10159; https://github.com/google/spectral-density, `jax/lanczos.py` and `jax/density.py`,
    whose grid ends 0.01 beyond the nodes and cuts the outer Gaussians.
    """

    def __init__(
        self,
        samples: int = 512,
        order: int = 90,
        draws: int = 1,
        variance: float = 1e-5,
        exclude: str | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in {"samples": samples, "order": order, "draws": draws}.items():
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if variance <= 0:
            raise ValueError(f"variance: must be positive, got {variance}")
        self.samples, self.order, self.draws = samples, order, draws
        self.variance, self.exclude, self.seed = variance, exclude, seed

    def on_fit_start(self, run: "Run") -> None:
        """Refuse parameters in pieces."""
        probing.refuse_shards(run, "the Hessian's spectrum")

    def on_eval_end(self, run: "Run") -> None:
        """Measure when training is over."""
        if run.step < run.max_steps:
            return
        started = time.monotonic()
        batch = probing.training_batch(run, self.samples)
        with twice_differentiable(run):
            outputs = run.objective.predict(batch)
            loss = masked_mean(run.task.loss(outputs, batch), outputs, batch)
            product, size = hessian_vector_product(loss, run.model, self.exclude)
            nodes, weights = quadrature(product, size, self.order, self.draws, self.seed)
        energy = weights * np.abs(nodes)
        run.record(
            {
                "probe/spectrum_trace": float(size * (weights * nodes).sum()),
                "probe/spectrum_largest": float(nodes.max()),
                "probe/spectrum_smallest": float(nodes.min()),
                "probe/spectrum_negative": float(energy[nodes < 0].sum() / energy.sum()),
            }
        )
        grid, values = density(nodes, weights, self.variance)
        drawn = probe_figures.spectra({run.config["name"]: [(grid, values)]})
        arrays = {"nodes": nodes, "weights": weights, "grid": grid, "density": values}
        seconds = time.monotonic() - started
        moving.keep(run, "spectrum", drawn, **arrays, size=size, seconds=seconds)


def quadrature(
    product: Product, size: int, order: int, draws: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of all draws together; the weights' sum is 1.

    Args:
        product: v ↦ H·v for a symmetric H (size, size).
    """
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        diagonal, off = lanczos(product, generator.standard_normal(size), min(order, size))
        nodes, vectors = eigh_tridiagonal(diagonal, off)
        found.append((nodes, vectors[0] ** 2 / draws))
    return np.concatenate([n for n, _ in found]), np.concatenate([w for _, w in found])


def lanczos(product: Product, start: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The diagonal and the one beside it of the tridiagonal T = Qᵀ·H·Q, where Q spans `start`,
    H·start, and so on; shorter than `order` where these span no more."""
    basis = np.zeros((order, len(start)))
    basis[0] = start / np.linalg.norm(start)
    diagonal, off = [], []
    for step in range(order):
        ahead = product(basis[step])
        diagonal.append(float(basis[step] @ ahead))
        for _ in range(2):  # once leaves what rounding makes of large parts taken away
            ahead = ahead - basis[: step + 1].T @ (basis[: step + 1] @ ahead)
        length = float(np.linalg.norm(ahead))
        if step + 1 == order or length <= 1e-10 * max(map(abs, [*diagonal, *off])):
            break
        off.append(length)
        basis[step + 1] = ahead / length
    return np.array(diagonal), np.array(off)


def density(
    nodes: np.ndarray, weights: np.ndarray, variance: float = 1e-5, points: int = 10_000
) -> tuple[np.ndarray, np.ndarray]:
    """A grid of eigenvalues, to six standard deviations of the Gaussians beyond the nodes, and the
    density on it, whose integral is 1."""
    spread = variance * max(1.0, float(np.ptp(nodes)))
    margin = 6 * spread**0.5
    grid = np.linspace(nodes.min() - margin, nodes.max() + margin, points)
    values = np.zeros(points)
    for node, weight in zip(nodes, weights):
        values += weight * np.exp(-((grid - node) ** 2) / (2 * spread))
    return grid, values / (values.sum() * (grid[1] - grid[0]))
