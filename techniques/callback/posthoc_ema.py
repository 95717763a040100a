"""Power-function averages of the weights, from whose snapshots others are made after training."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from techniques.callback.averaging import Average
from training.errors import EnvironmentFault
from training.files import write_atomically
from training.parallel import whole

if TYPE_CHECKING:
    from training.run import Run

LARGEST = 12**-0.5
"""σ of the plain mean of all weights, 0.289."""


class PowerEMA:
    """Tracks averages that weight step τ of t by τ^γ: θ̄ ← β·θ̄ + (1 − β)·θ with
    β = (1 − 1/t)^(γ+1), so that an average's length is a fraction of the training so far.

    An average is named by σ, its profile's standard deviation as a fraction of t:
    σ² = (γ + 1) / ((γ + 2)²·(γ + 3)). Every `every` steps all are written to `snapshots/` in the
    run's folder. `reconstruct` makes an average of another σ of them: their weights give the
    profile nearest to the wanted one in least squares, and sum to 1.

    t is counted in steps (the code's in images: the same while the batch size does not change), and
    snapshots have the parameters' precision (the code's: float16). Buffers are not averaged.

    Args:
        sigma_rel: σ of the averages; 0.05 and 0.10, the code's.
        every: steps between snapshots; the code's runs of 2 GiB images have 256.

    Raises:
        ValueError: for no σ, one outside (0, 0.289), or an `every` below 1.

    Source: "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696;
    https://github.com/NVlabs/edm2, `training/phema.py`, `reconstruct_phema.py`.
    """

    def __init__(self, sigma_rel: Sequence[float] = (0.05, 0.10), every: int = 100) -> None:
        if not sigma_rel:
            raise ValueError("sigma_rel: expected at least one")
        if every < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        self.exponents = {sigma: exponent(sigma) for sigma in sigma_rel}
        self.every = every
        self.averages = {sigma: Average() for sigma in sigma_rel}

    def on_fit_start(self, run: "Run") -> None:
        """Follow the parameters."""
        for average in self.averages.values():
            average.follow(run.objective)

    def on_step_end(self, run: "Run") -> None:
        """Update the averages, and write them when it is time."""
        for sigma, average in self.averages.items():
            beta = (1 - 1 / run.step) ** (self.exponents[sigma] + 1)
            average.update(get_ema_multi_avg_fn(beta))
            if run.step % self.every == 0:
                _write(run, snapshot(run.folder, run.step, sigma), average)

    def reconstruct(self, run: "Run", sigma: float) -> dict[str, Tensor]:
        """The average of length `sigma` over the training so far, whole, by the parameter's name:
        of the snapshots and of the averages as they are now.

        Raises:
            ValueError: for a σ outside (0, 0.289), or before the first step.
            EnvironmentFault: for a snapshot that is missing or unreadable.
        """
        if not run.step:
            raise ValueError("reconstruct: no step has been taken")
        steps = [*range(self.every, run.step, self.every), run.step]
        sources = [(step, own) for step in steps for own in self.averages]
        solved = coefficients(sources, (run.step, sigma))
        total: dict[str, Tensor] = {}
        for (step, own), coefficient in zip(sources, solved):
            tensors = (
                {n: whole(t).cpu() for n, t in self.averages[own].tensors.items()}
                if step == run.step
                else _read(snapshot(run.folder, step, own))
            )
            for name, tensor in tensors.items():
                part = tensor.double() * coefficient
                total[name] = total[name] + part if name in total else part
        parameters = self.averages[sources[0][1]].parameters
        return {name: total[name].to(p.dtype) for name, p in parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        """The averages, in order."""
        return {"averages": [average.state_dict() for average in self.averages.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        for average, own in zip(self.averages.values(), state["averages"]):
            average.load_state_dict(own)


@functools.cache
def exponent(sigma: float) -> float:
    """γ of a profile's relative standard deviation: the largest root of
    (γ + 2)²(γ + 3) = (γ + 1)/σ².

    Raises:
        ValueError: for a σ outside (0, 0.289), beyond which γ would be negative.
    """
    if not 0 < sigma < LARGEST:
        raise ValueError(f"sigma_rel: must be between 0 and {LARGEST:.3f}, got {sigma}")
    inverse = sigma**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def correlation(
    a_step: np.ndarray, a_gamma: np.ndarray, b_step: np.ndarray, b_gamma: np.ndarray
) -> np.ndarray:
    """∫ p_a(τ)·p_b(τ) dτ of profiles p(τ) = (γ + 1)·τ^γ / t^(γ+1) on [0, t], broadcast."""
    shared = np.where(a_step < b_step, b_gamma, -a_gamma)
    numerator = (a_gamma + 1) * (b_gamma + 1) * (a_step / b_step) ** shared
    return numerator / ((a_gamma + b_gamma + 1) * np.maximum(a_step, b_step))


def coefficients(sources: list[tuple[int, float]], wanted: tuple[int, float]) -> np.ndarray:
    """Weights of the averages `sources`, each a step and a σ, that give the one `wanted`.

    They minimise the squared distance between the profiles, and are then divided by their sum.
    """
    steps, gammas = np.array([(step, exponent(sigma)) for step, sigma in sources], float).T
    gram = correlation(steps[:, None], gammas[:, None], steps, gammas)
    end, gamma = np.array([[wanted[0]], [exponent(wanted[1])]], float)
    target = correlation(steps, gammas, end, gamma)
    solution = np.linalg.solve(gram, target)
    return solution / solution.sum()


def snapshot(folder: Path, step: int, sigma: float) -> Path:
    """The file of one average at one step."""
    return folder / "snapshots" / f"step-{step:08d}-{sigma:g}.safetensors"


def _write(run: "Run", path: Path, average: Average) -> None:
    """Write an average; all processes gather it and the main one writes."""
    tensors = {n: whole(t).cpu().contiguous() for n, t in average.tensors.items()}
    if not run.main:
        return
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, save(tensors))
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path}: {error.strerror or error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"cannot read the snapshot {path}: {error}") from error
