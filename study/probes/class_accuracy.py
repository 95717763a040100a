"""The accuracy on some classes."""

from typing import TYPE_CHECKING

import torch

from techniques.callback import probing

if TYPE_CHECKING:
    from training.run import Run


class ClassAccuracy:
    """Records after the last step the accuracy on some classes' validation samples, all of them
    together, as `probe/accuracy_of_classes`.

    Args:
        classes: labels.

    Raises:
        ValueError: for no classes, or at the end when no validation sample is of them.
    """

    def __init__(self, classes: list[int]) -> None:
        if not classes:
            raise ValueError("classes: needs at least one")
        self.classes = classes

    def on_eval_end(self, run: "Run") -> None:
        """Measure when training is over."""
        if run.step < run.max_steps:
            return
        correct = []
        for batch, outputs in probing.validation(run):
            labels = batch["labels"]
            own = torch.isin(labels, torch.tensor(self.classes, device=labels.device))
            correct.append((outputs["logits"].argmax(-1) == labels)[own])
        found = torch.cat(correct)
        if not len(found):
            raise ValueError(f"classes: no validation sample is of {self.classes}")
        run.record({"probe/accuracy_of_classes": found.float().mean().item()})
