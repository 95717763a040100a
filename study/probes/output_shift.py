"""How far what a model says elsewhere has moved towards what it is being taught."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tasks import losses
from tasks.fetch import fetch
from techniques.callback import probing
from training.components import call
from training.data import move
from training.errors import UsageError
from training.evaluate import spread

if TYPE_CHECKING:
    from training.run import Run

CLASSES = ("vocab_size", "num_classes")


class OutputShift:
    """Records at each evaluation, on validation samples of another task, which the run does not
    train on,

    - `probe/held_out_loss` and `probe/held_out_accuracy`: the plain loss and the accuracy;
    - `probe/output_shift`: KL(p ‖ p₀) in nats, where p is the mean of the predicted probabilities
      over all labelled positions, and p₀ what it was before the first step;
    - with `tokens`, `probe/token_bias`: the probability of those classes together in p, and
      `probe/token_bias_max`: the mean over positions of the largest probability among them.

    The last two are the paper's counting-bias probe, where the tokens are numbers: it asks a model
    that learns to count to describe pictures and averages over the tokens it writes; here it is
    over the positions of given text. p and KL are its generalisation to all tokens.

    Args:
        task: a task component with the run's classes.
        samples: of its validation set, evenly spaced.
        tokens: classes whose probability is watched.

    Raises:
        ValueError: for fewer than one sample.
        UsageError: at the start, for a task of other classes, or tokens that are none of them.

    Source: "How to Teach Large Multimodal Models New Skills", arXiv 2510.08564;
    https://github.com/jessemelpolio/LMM_CL,
    `scripts/analysis/output_logit_single_model_inference.py`.
    """

    def __init__(
        self, task: Callable[..., Any], samples: int = 256, tokens: list[int] | None = None
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples: must be at least 1, got {samples}")
        self.make, self.samples, self.tokens = task, samples, tokens or []
        self.before: Tensor | None = None

    def on_fit_start(self, run: "Run") -> None:
        """Look at what the run starts from."""
        self.task = call(self.make, "callbacks.output_shift.task")
        own, theirs = (_classes(task) for task in (run.task, self.task))
        if own is None or own != theirs:
            raise UsageError(f"callbacks.output_shift.task: it has {theirs} classes, not {own}")
        if not all(0 <= token < own for token in self.tokens):
            raise UsageError(f"callbacks.output_shift.tokens: from 0 to {own - 1}, {self.tokens}")
        if self.before is None:
            self.before = self._look(run)["marginal"]

    def on_eval_end(self, run: "Run") -> None:
        """Compare."""
        assert self.before is not None
        found = self._look(run)
        marginal = found["marginal"]
        shift = (
            torch.special.entr(marginal).sum().neg()
            - torch.special.xlogy(marginal, self.before).sum()
        )
        values = {
            "probe/held_out_loss": found["loss"],
            "probe/held_out_accuracy": found["accuracy"],
            "probe/output_shift": shift,
        }
        if self.tokens:
            values["probe/token_bias"] = marginal[self.tokens].sum()
            values["probe/token_bias_max"] = found["largest"]
        run.record({name: float(value) for name, value in values.items()})

    def _look(self, run: "Run") -> dict[str, Tensor]:
        """Means over positions, in float64."""
        sums: dict[str, Tensor] = {}
        count = 0
        for part in spread(len(self.task.validation), self.samples).split(64):
            rows = fetch(self.task.validation, part)
            generator = torch.Generator().manual_seed(0)
            batch = move(self.task.prepare(rows, generator, False), run.device)
            with probing.looking(run):
                outputs = run.objective.predict(batch)
                known = batch["labels"] != losses.IGNORED
                p = outputs["logits"][known].double().softmax(-1)
                values = {
                    "marginal": p.sum(0),
                    "loss": losses.cross_entropy(outputs, batch)[known].double().sum(),
                    "accuracy": losses.correct(outputs, batch)[known].double().sum(),
                }
                if self.tokens:
                    values["largest"] = p[:, self.tokens].amax(-1).sum()
            count += len(p)
            for name, value in values.items():
                sums[name] = sums[name] + value.cpu() if name in sums else value.cpu()
        return {name: value / count for name, value in sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """What the run started from."""
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.before = state["before"]


def _classes(task: Any) -> int | None:
    return next((task.dims[name] for name in CLASSES if name in task.dims), None)
