"""Temperature scaling."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from study.probes.calibration import calibration_error
from techniques.callback import probing
from techniques.post.held_out import check_share, halves, said
from training.errors import UsageError
from training.parallel import reshard

if TYPE_CHECKING:
    from training.run import Run


class Temperature:
    """Divides the logits by the T > 0 that makes the negative log-likelihood of held-out samples
    least: softmax(z/T). The classifier's weights and biases become W/T and b/T, so that the model
    that is kept has T in it.

    T is fitted to a share of the validation set. Over the rest `post/temperature/nll` (nats) and
    `post/temperature/ece`, the expected calibration error, are recorded, both also as they were
    `before_`, and T as `post/temperature/t`.

    Args:
        share: of the validation set, for the fit; the rest is judged by.
        bins: of confidence for the calibration error; 15 as in both sources.
        transform: `(Dataset) -> Dataset`, of the samples for the fit, such as the noise that the
            training labels have.
        seed: of the choice of samples.

    Raises:
        ValueError: for a share outside (0, 1), or fewer than one bin.
        UsageError: when it is applied, for a model whose last layer is no plain `nn.Linear` of its
            own.

    Source: "On Calibration of Modern Neural Networks", arXiv 1706.04599;
    https://github.com/gpleiss/temperature_scaling, `temperature_scaling.py`. There and in
    https://github.com/2014mchidamb/temp-scaling-limitations, `models/temperature_scaled_model.py`,
    L-BFGS takes steps of 0.01, at most 200 and 20 of them; here a line search takes it to the end.
    """

    def __init__(
        self,
        share: float = 0.5,
        bins: int = 15,
        transform: Callable[[Dataset], Dataset] | None = None,
        seed: int = 0,
    ) -> None:
        check_share(share)
        if bins < 1:
            raise ValueError(f"bins: must be at least 1, got {bins}")
        self.share, self.bins, self.transform, self.seed = share, bins, transform, seed

    @torch.no_grad()
    def __call__(self, run: "Run") -> None:
        """Fit T, and make it the model's."""
        layer = _classifier(run)
        held, rest = halves(run, self.share, self.seed)
        t = fitted(*said(run, self.transform(held) if self.transform else held))
        logits, labels = said(run, rest)
        reshard(run.model)
        for parameter in layer.parameters():
            parameter.div_(t)
        measured = {"t": t}
        for name, scaled in (("before_", logits), ("", logits / t)):
            confidence, predicted = scaled.softmax(-1).max(-1)
            correct = (predicted == labels).double()
            measured[f"{name}nll"] = F.cross_entropy(scaled, labels).item()
            measured[f"{name}ece"] = calibration_error(confidence, correct, self.bins)
        run.record({f"post/temperature/{name}": value for name, value in measured.items()})


def fitted(logits: Tensor, labels: Tensor) -> float:
    """The temperature of least mean negative log-likelihood.

    That is convex in 1/T, and has no minimum where every label has the largest logit: T is then as
    small as the search gets before the slope vanishes.

    Args:
        logits: (n, classes).
        labels: (n,), classes.
    """
    inverse = torch.zeros((), dtype=torch.float64, requires_grad=True)  # log 1/T
    search = torch.optim.LBFGS(
        [inverse],
        max_iter=200,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        with torch.enable_grad():
            value = F.cross_entropy(logits.double() * inverse.exp(), labels)
        value.backward()
        return value

    search.step(loss)  # type: ignore[arg-type]
    return math.exp(-inverse.item())


def _classifier(run: "Run") -> nn.Linear:
    """The layer that makes the logits, and nothing else."""
    _, outputs = next(probing.validation(run, size=1))
    layer = outputs.get("classifier")
    if type(layer) is not nn.Linear:
        kind = type(layer).__name__ if layer is not None else "not named in its outputs"
        raise UsageError(f"post.temperature: the model's classifier is {kind}, not nn.Linear")
    names = [n for n, p in run.model.named_parameters(remove_duplicate=False) if p is layer.weight]
    if len(names) > 1:
        raise UsageError(f"post.temperature: {' and '.join(names)} are one parameter")
    return layer
