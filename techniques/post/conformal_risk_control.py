"""Conformal risk control: sets of classes that miss the label as rarely as is asked for."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tasks.losses import IGNORED
from techniques.callback import probing
from techniques.post.held_out import check_share
from training.errors import UsageError

if TYPE_CHECKING:
    from training.run import Run


class ConformalRiskControl:
    """Chooses from n calibration samples the λ of the sets C_λ = {c: p(c) ≥ 1 − λ}, so that the
    expected loss of a new sample is at most α: the least λ of a grid with

        n/(n + 1)·R̂(λ) + B/(n + 1) < α,

    where R̂ is the samples' mean loss, and B = 1 its bound; λ = 1, all classes, where there is none.
    A sample's loss is the share of its labels that are not in their sets, its false negative rate:
    0 or 1 of a label, between them of a text. The model stays as it is.

    Calibration part and rest are drawn anew in each of `splits` random splits of the validation
    set. Their means are recorded as `post/conformal_risk_control/lambda`, `/risk` and `/size`, loss
    and classes a set over the rest, with `/risk_std`, the deviation of the risk over splits; as
    `/naive_...` the same without the correction, of the least λ with R̂(λ) ≤ α. `/samples` is n.

    Args:
        alpha: the risk that is asked for; 0.1 as the authors' `risk_histogram.py`.
        share: of the samples, for the calibration.
        splits: how many are averaged over; 1,000 as there.
        grid: values of λ, evenly from 0 to 1.
        samples: of the validation set, evenly spaced; null is all.
        seed: of the splits.

    Raises:
        ValueError: for an alpha or share outside (0, 1), or too small a number of splits or values.
        UsageError: when it is applied, for labels that are not classes, or a share that leaves a
            part without a sample.

    Source: "Conformal Risk Control", arXiv 2208.02814;
    https://github.com/aangelopoulos/conformal-risk, `core/get_lhat.py` and
    `coco/src/risk_histogram.py`. The paper has ≤ α, the code, which is followed, < α; where even
    λ = 0 satisfies it the code gives all classes, here λ is 0.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        share: float = 0.5,
        splits: int = 1000,
        grid: int = 1001,
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"alpha: expected above 0 and below 1, got {alpha}")
        check_share(share)
        if splits < 2 or grid < 2:
            raise ValueError(f"splits, grid: at least 2, got {splits} and {grid}")
        self.alpha, self.share, self.splits, self.seed = alpha, share, splits, seed
        self.grid = torch.linspace(0, 1, grid, dtype=torch.float64)
        self.samples = samples

    def __call__(self, run: "Run") -> None:
        """Choose λ, and record what its sets are worth."""
        risks, sizes = self._tables(run)
        n = round(self.share * len(risks))
        if not 0 < n < len(risks):
            raise UsageError(f"share: {self.share} of {len(risks)} samples is none or all")
        rng = np.random.default_rng(self.seed)
        chosen = np.zeros((self.splits, len(risks)))
        for row in chosen:
            row[rng.permutation(len(risks))[:n]] = 1
        measured = {"samples": float(n)}
        sums = chosen @ risks
        ways = {"": least(sums, n, self.alpha), "naive_": first(sums / n <= self.alpha)}
        for name, at in ways.items():
            risk, size = (
                ((1 - chosen) * table[:, at].T).sum(1) / (len(risks) - n)
                for table in (risks, sizes)
            )
            measured |= {
                f"{name}lambda": float(self.grid[at].mean()),
                f"{name}risk": float(risk.mean()),
                f"{name}risk_std": float(risk.std(ddof=1)),
                f"{name}size": float(size.mean()),
            }
        run.record({f"post/conformal_risk_control/{k}": v for k, v in measured.items()})

    def _tables(self, run: "Run") -> tuple[np.ndarray, np.ndarray]:
        """Each sample's loss and mean size of its sets, (samples, values of λ)."""
        parts = [
            tabulated(outputs["logits"].cpu(), batch["labels"].cpu(), self.grid)
            for batch, outputs in probing.validation(run, samples=self.samples)
        ]
        risks, sizes = (torch.cat(part).numpy() for part in zip(*parts))
        return risks, sizes


def least(sums: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """For each row of losses summed over n samples, which do not rise from left to right, the first
    place where (sum + 1)/(n + 1) is below alpha, or the last place.

    Args:
        sums: (rows, values of λ).
    """
    return first((sums + 1) / (n + 1) < alpha)


def first(fits: np.ndarray) -> np.ndarray:
    """The first true place of each row, or the last place."""
    return np.where(fits.any(1), fits.argmax(1), fits.shape[1] - 1)


def tabulated(logits: Tensor, labels: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's share of labels that are not in {c: 1 − p(c) ≤ λ}, and the mean size of these
    sets, both (samples, values of λ) in float64.

    Args:
        logits: (samples, ..., classes).
        labels: (samples, ...), classes or −100.
        grid: values of λ, rising.

    Raises:
        UsageError: for labels that are not classes.
    """
    if labels.is_floating_point():
        raise UsageError("post.conformal_risk_control: needs labels that are classes")
    needed = 1 - logits.double().softmax(-1)  # from which λ on each class is in
    needed, labels = needed.view(len(labels), -1, logits.shape[-1]), labels.view(len(labels), -1)
    counts = labels != IGNORED
    needed = needed.masked_fill(~counts[..., None], torch.inf)
    own = needed.gather(-1, labels.clamp(min=0)[..., None])
    total = counts.sum(1, keepdim=True).clamp(min=1)
    covered, sizes = (_counted(values.flatten(1), grid) / total for values in (own, needed))
    return counts.any(1, keepdim=True).double() - covered, sizes


def _counted(values: Tensor, grid: Tensor) -> Tensor:
    """How many of each row's values are at most each of the grid's."""
    rows = grid.expand(len(values), -1).contiguous()
    return torch.searchsorted(values.sort(1).values, rows, right=True).double()
