"""Whether a model's representations have collapsed."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from study.probes.representations import represent

if TYPE_CHECKING:
    from training.run import Run


class Collapse:
    """Records at each evaluation, of validation samples without augmentation, for the embeddings
    (behind the projection or the head) and the features (before it):

    `probe/embedding_std` and `probe/feature_std`, each feature's standard deviation over the
    samples, averaged over features: 0 when all samples are one point. `probe/embedding_rank` and
    `probe/feature_rank`, the `effective_rank` of the matrix of them: 1 when all are on a line.

    Raises:
        UsageError: at the start, for a model without features.
    """

    def on_fit_start(self, run: "Run") -> None:
        """Try a sample."""
        represent(run, run.task.validation, 1)

    def on_eval_end(self, run: "Run") -> None:
        """Measure."""
        found = represent(run, run.task.validation, run.config["trainer"]["eval_samples"])
        matrices = {"embedding": found.embeddings, "feature": found.features}
        for name, x in matrices.items():
            std = x.std(0, correction=0).mean().item()
            run.record({f"probe/{name}_std": std, f"probe/{name}_rank": effective_rank(x)})


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the singular values of `(samples, features)`, scaled to sum to 1: from
    1 to the smaller of both. They are not centred, as the noise of a collapsed matrix would then
    count for all. NaN for a matrix of zeros.

    Source: "The Effective Rank: A Measure of Effective Dimensionality", Roy and Vetterli, EUSIPCO
    2007; of embeddings as in "RankMe", arXiv 2210.02885, without its ε.
    """
    values = torch.linalg.svdvals(x.double())
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()
