"""CoLoR-Filter: keep the sequences whose loss falls most when a model learns the target."""

from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from tasks.cache import model_digest
from techniques.data.selection import Scores, check, over, sample_losses, scored
from training.objective import Batch
from training.trained import model_of

Source = str | Callable[..., nn.Module] | None


def scores(
    dataset: Dataset,
    *,
    task: Any,
    accelerator: Accelerator,
    prior: Source,
    conditional: Source,
    conditional_only: bool = False,
    trust: bool = False,
    batch_size: int = 64,
) -> Scores:
    """−log p(x | conditional) + log p(x | prior) of each sequence x, in nats a token: its mean loss
    under the prior, fine-tuned on the target, less its mean loss under the prior. `Select` keeps
    the lowest.

    The authors' code takes the mean of the losses over the tokens of a sequence, in the precision
    of the run, subtracts the other way round and keeps the ⌊samples/τ⌋ highest, with τ of 64, 32,
    16 or 7: a fraction of 1/τ.

    Args:
        dataset, task, accelerator: what `Select` gives.
        prior: a run's folder, or a component that makes a model: small, trained on general data.
        conditional: the same: the prior, trained further on the target's data.
        conditional_only: its loss alone, an ablation of the paper's, which needs no prior.
        trust: import what a folder's configuration names from whatever package.
        batch_size: sequences at once.

    Raises:
        UsageError: for a folder without a checkpoint, or a model that does not work on the task.

    Source: "CoLoR-Filter: Conditional Loss Reduction Filtering for Targeted Language Model
    Pre-training", arXiv 2406.10670; https://github.com/davidbrandfonbrener/color-filter-olmo,
    `olmo/score.py` and `scripts/select_index_np.py`.
    """
    where = "data.transforms.color_filter.scores"
    sources = ({} if conditional_only else {"prior": prior}) | {"conditional": conditional}
    asked = [
        _asked(source, dataset, task, accelerator, f"{where}.{name}", trust)
        for name, source in sources.items()
    ]
    losses = [loss for loss, _ in asked]

    def score() -> np.ndarray:
        def reduction(batch: Batch) -> Tensor:
            return losses[-1](batch) - (0.0 if conditional_only else losses[0](batch))

        return over(reduction, dataset, task, accelerator, batch_size)

    return scored(dataset, task, ["color-1", *(about for _, about in asked)], score, accelerator)


def _asked(
    source: Source, dataset: Dataset, task: Any, accelerator: Accelerator, where: str, trust: bool
) -> tuple[Callable[[Batch], Tensor], str]:
    """A model's loss of each sample of a batch, and what the model is."""
    model, about = model_of(source, accelerator, where, trust, task.dims)
    losses = sample_losses(model, task)
    check(losses, dataset, task, accelerator, where)
    return losses, about + model_digest(model)
