"""VICReg: variance, invariance and covariance of two views' embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.losses import precise
from techniques.loss.inf_cl_tiled_contrastive import processes
from training.errors import UsageError
from training.parallel import gathered

EPSILON = 1e-4
"""Added to a variance before its root; the authors'."""


class VICReg(nn.Module):
    """λ·s(X, Y) + μ·[v(X) + v(Y)]/2 + ν·[c(X) + c(Y)] of the embeddings X and Y of two views.

    s is the mean of (x − y)² over samples and features; v the mean over features of
    max(0, 1 − √(var + 1e-4)), a hinge on each feature's standard deviation over the batch; c the
    sum of the squared covariances of two different features, over the number of features. Variances
    and covariances are those of the batch of all processes, divided by n − 1.

    A pair's loss is its own λ·mean (x − y)² plus the batch's v and c terms, so that the mean over
    pairs is the loss above. The embeddings are not normalised.

    The paper writes s with the sum over features and [v(X) + v(Y)] without the half; the authors'
    code, followed here, has both.

    At least 0, which is reached where partners agree and every feature has a standard deviation of
    at least 1 and no covariance with another. Without v the minimiser is a constant. Embeddings far
    out make s grow with their square and c with the fourth power, with gradients of one power less.
    Where all embeddings are exactly equal the hinge's gradient is zero, as that of the variance is.

    Args:
        invariance: λ; 25.
        variance: μ; 25.
        covariance: ν; 1.

    Shapes: `logits` (2·batch, embedding) of two views, partners `batch` apart, to losses (batch,).

    Raises:
        ValueError: for a coefficient below 0.
        UsageError: for images with captions, whose embeddings have length 1 and can have no such
            variance, or for a single pair.

    Source: "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
    arXiv 2105.04906; https://github.com/facebookresearch/vicreg, `main_vicreg.py`.
    """

    def __init__(
        self, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
    ) -> None:
        super().__init__()
        given = {"invariance": invariance, "variance": variance, "covariance": covariance}
        for name, value in given.items():
            if value < 0:
                raise ValueError(f"{name}: must not be negative, got {value}")
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        if "image_embeds" in outputs:
            raise UsageError("task.loss: VICReg needs two views of an image, the task has captions")
        z = outputs["logits"]
        views = precise(z).chunk(2)
        group = processes(self.training)
        regular = z.new_zeros((), dtype=views[0].dtype)
        with torch.autocast(z.device.type, enabled=False):
            distances = (views[0] - views[1]).square().mean(1)
            for x in (gathered(view, group) for view in views):
                if len(x) < 2:
                    raise UsageError("trainer.batch_size: VICReg needs at least 2 pairs")
                x = x - x.mean(0)
                covariance = x.T @ x / (len(x) - 1)
                v = F.relu(1 - (covariance.diagonal() + EPSILON).sqrt()).mean()
                itself = torch.eye(len(covariance), dtype=torch.bool, device=x.device)
                c = covariance.masked_fill(itself, 0).square().sum() / len(covariance)
                regular = regular + self.variance * v / 2 + self.covariance * c
        return self.invariance * distances + regular
