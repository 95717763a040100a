"""The sharpness of the minimum that a run ends in."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from techniques.callback import probing

if TYPE_CHECKING:
    from training.run import Run


class HessianEigenvalue:
    """Records the largest eigenvalue of the training loss's Hessian after the last step, as
    `probe/hessian`, and if asked the smallest as `probe/hessian_smallest`: below 0 at a saddle.

    The loss is the task's mean loss, without penalties, over evenly spaced training samples, the
    model in evaluation mode. Lanczos iteration (`scipy.sparse.linalg.eigsh`) on Hessian-vector
    products in float32, from a fixed vector.

    Args:
        samples: of the training set, all in one batch.
        tolerance: relative, of the eigenvalue.
        exclude: regular expression, searched in the names of parameters that are held constant.
        classes: labels of the samples whose loss it is; default all.
        smallest: whether to find the smallest eigenvalue too.

    Raises:
        ValueError: for fewer than one sample, or at the end for classes that none of them has.

    Source: the measurement of "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", arXiv 2010.01412, section 4.
    """

    def __init__(
        self,
        samples: int = 512,
        tolerance: float = 1e-3,
        exclude: str | None = None,
        classes: list[int] | None = None,
        smallest: bool = False,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples: must be at least 1, got {samples}")
        self.samples, self.tolerance, self.exclude = samples, tolerance, exclude
        self.classes, self.smallest = classes, smallest

    def on_eval_end(self, run: "Run") -> None:
        """Measure when training is over."""
        if run.step < run.max_steps:
            return
        batch = probing.training_batch(run, self.samples)
        if self.classes is not None:
            chosen = torch.isin(batch["labels"], torch.tensor(self.classes, device=run.device))
            if not chosen.any():
                raise ValueError(f"classes: no training sample is of {self.classes}")
            batch = {name: value[chosen] for name, value in batch.items()}
        with twice_differentiable(run):
            losses = run.task.loss(run.objective.predict(batch), batch)
            ends = (losses.mean(), run.model, self.tolerance, self.exclude)
            found = {"probe/hessian": eigenvalue(*ends)}
            if self.smallest:
                found["probe/hessian_smallest"] = eigenvalue(*ends, which="SA")
        run.record(found)


@contextlib.contextmanager
def twice_differentiable(run: "Run") -> Iterator[None]:
    """Within it the model is in evaluation mode and its loss can be differentiated twice."""
    training = run.model.training
    run.objective.eval()
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        run.objective.train(training)


def eigenvalue(
    loss: Tensor,
    model: nn.Module,
    tolerance: float = 1e-3,
    exclude: str | None = None,
    which: str = "LA",
) -> float:
    """The largest (`which="LA"`) or smallest (`"SA"`) eigenvalue of a scalar loss's Hessian over
    the model's trained parameters, but those whose name has a match of `exclude`."""
    product, size = hessian_vector_product(loss, model, exclude)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)  # type: ignore[call-arg]
    start = np.random.default_rng(0).standard_normal(size)
    values, _ = eigsh(operator, k=1, which=which, v0=start, tol=tolerance)  # type: ignore[arg-type]
    return float(values[0])


def hessian_vector_product(
    loss: Tensor, model: nn.Module, exclude: str | None = None
) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """v ↦ H·v in the parameters' precision, each at the cost of about two backwards, and the size
    of v: H is the loss's Hessian over the model's trained parameters, but those whose name has a
    match of `exclude`."""
    parameters = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and not (exclude and re.search(exclude, name))
    ]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.flatten() for g in gradients])

    def product(vector: np.ndarray) -> np.ndarray:
        direction = torch.from_numpy(vector.ravel()).to(flat)
        columns = torch.autograd.grad(
            flat, parameters, direction, retain_graph=True, materialize_grads=True
        )
        return torch.cat([c.flatten() for c in columns]).double().cpu().numpy()

    return product, flat.numel()
