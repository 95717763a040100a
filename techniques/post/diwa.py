"""DiWA: one model whose weights are the mean of several runs'."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training import checkpoint
from training.errors import UsageError, nearest
from training.evaluate import evaluate

if TYPE_CHECKING:
    from training.run import Run

SELECT = ("uniform", "greedy")
DIRECTIONS = ("lower", "higher")


class DiWA:
    """Diverse weight averaging: θ = (1/M)·Σ_m θ_m over the run's own weights and those of other
    runs, which all started from the same trained weights.

    What is averaged is everything real in the model's state. The authors average parameters and
    take the first run's buffers; their batch norms are frozen, so that buffers are equal and both
    are the same. Statistics of batch norms that were trained are averaged too, not measured anew.

    "greedy", the authors' "restricted", sorts the runs by `metric`, the best first, and takes one
    after another into the mean if this does not make the mean's `metric` worse; the first is always
    in. Every `metric` is measured on the run's validation set. Under domain generalisation that
    must be one of the training domains, such as `val/source_accuracy` of `task=rotated_digits`,
    never one of the domain the run is judged by. Uniform averaging looks at no data.

    The authors take each run's weights from the step with the best accuracy on the training
    domains' validation data; here it is the newest checkpoint's. The number of runs in the mean is
    recorded as `post/diwa/members`.

    Args:
        of: folders of the other runs. A run with `trainer.max_steps=0` and `trainer.start_from`
            only merges.
        select: "uniform", all of them, or "greedy".
        metric: of "greedy", as evaluation names it.
        direction: of a better `metric`, "lower" or "higher".

    Raises:
        ValueError: for another `select` or `direction`.
        UsageError: for a folder without a checkpoint or of another model; when it is applied, for
            a `metric` the task does not have.

    Source: "Diverse Weight Averaging for Out-of-Distribution Generalization", arXiv 2205.09739;
    https://github.com/alexrame/diwa, `domainbed/scripts/diwa.py` and
    `domainbed/algorithms_inference.py`.
    """

    def __init__(
        self,
        of: list[str],
        select: str = "uniform",
        metric: str = "val/loss",
        direction: str = "lower",
    ) -> None:
        for name, value, known in (
            ("select", select, SELECT),
            ("direction", direction, DIRECTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}: one of {', '.join(known)}, got '{value}'")
        for folder in of:
            if not checkpoint.found(Path(folder)):
                raise UsageError(f"post.diwa.of: no checkpoint in {folder}")
        self.of, self.select = of, select
        self.metric, self.sign = metric, 1 if direction == "higher" else -1

    @torch.no_grad()
    def __call__(self, run: "Run") -> None:
        """Give the run's model the mean."""
        self.own = _copied(run.model)
        members: list[str | None] = [None, *self.of]  # None is the run itself
        count = (self._greedily if self.select == "greedy" else self._uniformly)(run, members)
        del self.own
        run.record({"post/diwa/members": float(count)})

    def _uniformly(self, run: "Run", members: list[str | None]) -> int:
        mean = self.own
        for number, member in enumerate(members[1:], 1):
            self._put(run, member)
            mean = _with(mean, run.model, number)
        _give(run.model, mean)
        return len(members)

    def _greedily(self, run: "Run", members: list[str | None]) -> int:
        scores = {}
        for member in members:
            self._put(run, member)
            scores[member] = self._score(run)
        first, *others = sorted(members, key=lambda m: scores[m], reverse=True)
        self._put(run, first)
        mean, best, count = _copied(run.model), scores[first], 1
        for member in others:
            self._put(run, member)
            tried = _with(mean, run.model, count)
            _give(run.model, tried)
            score = self._score(run)
            if score >= best:
                mean, best, count = tried, score, count + 1
        _give(run.model, mean)
        return count

    def _put(self, run: "Run", member: str | None) -> None:
        if member is None:
            _give(run.model, self.own)
        else:
            checkpoint.load_weights(run.model, Path(member), "post.diwa.of")

    def _score(self, run: "Run") -> float:
        found = evaluate(run)
        if self.metric not in found:
            hint = nearest(self.metric, found)
            raise UsageError(f"post.diwa.metric: no metric '{self.metric}'{hint}")
        return self.sign * found[self.metric]


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _with(mean: dict[str, Tensor], model: nn.Module, count: int) -> dict[str, Tensor]:
    """The mean of `count` models with one more; of whole numbers the first's."""
    return {
        name: mean[name] + (value - mean[name]) / (count + 1)
        if value.is_floating_point()
        else mean[name]
        for name, value in model.state_dict().items()
    }


def _give(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        value.copy_(state[name])
