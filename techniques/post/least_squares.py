"""The last layer by least squares: of a random network, a random feature model."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from techniques.callback import probing
from training.errors import UsageError

if TYPE_CHECKING:
    from training.run import Run


class LeastSquares:
    """After training, sets the last layer to the one of least squared error on the training set,
    and of these the one of least norm, in float64.

    For regression of one number by a model with `hidden` features and a linear `head`. All the
    training set's features are in memory at once.

    Raises:
        UsageError: for another model, or labels that are classes.
    """

    def __call__(self, run: "Run") -> None:
        """Solve and set."""
        head = getattr(run.model, "head", None)
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise UsageError("post: LeastSquares needs a model with a linear head of one output")
        pairs = list(probing.validation(run, run.task.train))
        labels = torch.cat([batch["labels"] for batch, _ in pairs])
        if not labels.is_floating_point():
            raise UsageError("post: LeastSquares is for regression, the labels are classes")
        hidden = torch.cat([outputs["hidden"] for _, outputs in pairs])
        found = solve(hidden.double(), labels.double())
        with torch.no_grad():
            head.weight.copy_(found[None, :-1])
            if head.bias is not None:
                head.bias.fill_(found[-1].item())


def solve(features: Tensor, labels: Tensor) -> Tensor:
    """The least-norm solution (width + 1,), its last the constant, of features (samples, width).

    Singular values below float32's precision of the largest, the precision that features are
    computed in, count as 0: units that are linear on all the data are nearly the same.
    """
    ones = torch.ones(len(features), 1, dtype=features.dtype, device=features.device)
    design = torch.cat([features, ones], dim=1).cpu()
    least = torch.finfo(torch.float32).eps
    found = torch.linalg.lstsq(design, labels[:, None].cpu(), rcond=least, driver="gelsd").solution
    return found[:, 0].to(features.device)
