"""What the gradients of a whole training cost."""

from typing import TYPE_CHECKING, Any

from study.probes.memory import Flops

if TYPE_CHECKING:
    from training.objective import Losses
    from training.run import Run


class GradientFlops:
    """Records at each evaluation the FLOPs of all gradients so far, as `probe/gradient_flops`:
    the matrix products, convolutions and fused attention of the steps' forward and backward (see
    `study.probes.memory.Flops`). Counting takes time: every n-th step is counted, for n. What
    callbacks compute besides is left out, if they are listed before this one.

    Args:
        every: n.

    Raises:
        ValueError: for an n below 1.
    """

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        self.every, self.total = every, 0

    def on_batch(self, run: "Run") -> None:
        """Count the step's."""
        if run.step % self.every:
            return
        inner = run.gradient

        def counted(*args: Any) -> "Losses":
            run.gradient = inner
            with Flops() as flops:
                losses = inner(*args)
            self.total += flops.total * min(self.every, run.max_steps - run.step)
            return losses

        run.gradient = counted

    def on_eval_end(self, run: "Run") -> None:
        """Record."""
        run.record({"probe/gradient_flops": float(self.total)})

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.total = state["total"]
