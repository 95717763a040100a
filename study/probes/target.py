"""Training until a metric is good enough."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.run import Run


class Target:
    """Ends training at the first evaluation whose metric has reached a value; the run's `step`
    then is how long it took, up to `trainer.eval_every`.

    Args:
        value: to be reached.
        metric: of evaluations.
        direction: "lower" when smaller is better, else "higher".

    Raises:
        ValueError: for another direction; at an evaluation, for a metric that it does not have.
    """

    def __init__(self, value: float, metric: str = "val/loss", direction: str = "lower") -> None:
        if direction not in ("lower", "higher"):
            raise ValueError(f"direction: expected lower or higher, got {direction!r}")
        self.value, self.metric, self.direction = value, metric, direction

    def on_eval_end(self, run: "Run") -> None:
        """Stop when it is there."""
        metrics = run.evaluation[1]
        if self.metric not in metrics:
            raise ValueError(f"metric: the evaluation has no '{self.metric}'")
        sign = 1 if self.direction == "lower" else -1
        if sign * metrics[self.metric] <= sign * self.value:
            run.stop(f"{self.metric} has reached {self.value}")
