"""Bags of digits, of which only the bag has a label: multiple-instance learning."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from tasks import losses
from tasks.arrays import as_dataset
from tasks.digits import Digits
from training.errors import UsageError


class Bags:
    """Tell whether a bag of scikit-learn's digits has the target digit in it.

    Half of the bags have `positives` of it and the other half none; the rest are other digits. All
    are drawn with replacement, those of validation bags from `Digits`' validation set. Sizes are
    normal, as in "Attention-based Deep Multiple Instance Learning", arXiv 1802.04712, whose bags of
    MNIST are drawn from all digits alike: https://github.com/AMLab-Amsterdam/AttentionDeepMIL,
    `dataloader.py`, where the numbers are from.

    `val/auc` is the area under the ROC curve, `val/attention_entropy` the mean entropy of the
    weights of a model that gives its `attention`, in nats.

    Args:
        bags, validation_bags: how many of each.
        target: the digit; 9 as there.
        positives: how many of it are in a positive bag.
        mean_size, deviation: of the sizes, which are at least `positives`; 10 and 2 as there.
        seed: of the draws.

    Raises:
        UsageError: for a number out of range.
    """

    unit = "samples"
    dims = {  # noqa: RUF012
        **{"in_channels": 1, "image_size": 8, "num_classes": 2},
        **{"in_features": 64, "out_features": 2},
    }

    def __init__(
        self,
        *,
        bags: int = 200,
        validation_bags: int = 200,
        target: int = 9,
        positives: int = 1,
        mean_size: float = 10.0,
        deviation: float = 2.0,
        seed: int = 0,
    ) -> None:
        counts = {"bags": (bags, 2), "validation_bags": (validation_bags, 2)}
        counts["positives"] = (positives, 1)
        for name, (value, least) in counts.items():
            if value < least:
                raise UsageError(f"task.{name}: must be at least {least}, got {value}")
        if target not in range(10):
            raise UsageError(f"task.target: a digit from 0 to 9, got {target}")
        if mean_size < positives or deviation < 0:
            raise UsageError(
                "task.mean_size, task.deviation: at least task.positives and 0, got "
                f"{mean_size} and {deviation}"
            )
        digits = Digits()
        parts = [np.asarray(part["pixels"]) for part in (digits.train, digits.validation)]
        labels = np.concatenate([part["labels"] for part in (digits.train, digits.validation)])
        pixels = (np.concatenate(parts) - digits.mean) / digits.std
        self.pixels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
        rng = np.random.default_rng(seed)
        sets = np.split(np.arange(len(labels)), [len(parts[0])])
        drawn = []
        for count, members in zip((bags, validation_bags), sets):
            sizes = rng.normal(mean_size, deviation, count).astype(int).clip(min=positives)
            is_target = labels[members] == target
            pools = members[is_target], members[~is_target]
            drawn.append([_bag(rng, *pools, positives * (i % 2), n) for i, n in enumerate(sizes)])
        largest = max(len(bag) for part in drawn for bag in part)
        self.train, self.validation = (_as_dataset(part, largest) for part in drawn)

    def count(self, batch: dict[str, Any]) -> int:
        """Bags in a batch."""
        return len(batch["labels"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`pixel_values` (batch, largest, 1, 8, 8), `attention_mask` (batch, largest), which is 0
        where a bag has no more digits, and `labels` (batch,), 1 or 0."""
        members = rows["members"]
        mask = members >= 0
        pixels = self.pixels[members.clamp(min=0)] * mask[..., None, None, None]
        return {"pixel_values": pixels, "attention_mask": mask.long(), "labels": rows["labels"]}

    loss = staticmethod(losses.cross_entropy)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Whether each bag was classified right, and the entropy of its attention."""
        found = {"accuracy": losses.correct(outputs, batch)}
        if "attention" in outputs:
            entropy = torch.special.entr(outputs["attention"]).sum(-1)
            found["attention_entropy"] = entropy.mean(1)
        return found

    def collect(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """By how much each bag's logit of the target is above the other, and its label."""
        logits = outputs["logits"].float()
        return {"score": logits[:, 1] - logits[:, 0], "labels": batch["labels"]}

    def summarise(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Area under the ROC curve; NaN where all bags have one label."""
        from sklearn.metrics import roc_auc_score

        if len(rows["labels"].unique()) < 2 or not rows["score"].isfinite().all():
            return {"auc": float("nan")}
        return {"auc": float(roc_auc_score(rows["labels"].numpy(), rows["score"].numpy()))}


def _bag(
    rng: np.random.Generator, target: np.ndarray, others: np.ndarray, positives: int, size: int
) -> np.ndarray:
    members = [rng.choice(target, positives), rng.choice(others, size - positives)]
    return rng.permutation(np.concatenate(members))


def _as_dataset(bags: list[np.ndarray], largest: int) -> Dataset:
    members = np.full((len(bags), largest), -1)
    for row, bag in zip(members, bags):
        row[: len(bag)] = bag
    return as_dataset({"members": members, "labels": np.arange(len(bags)) % 2})
