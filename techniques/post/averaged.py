"""Averaged weights as the model's."""

from typing import TYPE_CHECKING

from training.errors import UsageError, nearest

if TYPE_CHECKING:
    from training.run import Run


class Averaged:
    """After training, sets the weights to the averages that a callback keeps.

    Args:
        callback: name of the callback, one of `techniques.callback.averaging`.

    Raises:
        UsageError: when there is no such callback, or it has averaged nothing yet.
    """

    def __init__(self, callback: str = "ema") -> None:
        self.callback = callback

    def __call__(self, run: "Run") -> None:
        """Set them."""
        averages = {n: c.average for n, c in run.callbacks.items() if hasattr(c, "average")}
        if self.callback not in averages:
            hint = nearest(self.callback, averages)
            raise UsageError(f"post: no callback '{self.callback}' with an average{hint}")
        if not averages[self.callback].averaged:
            raise UsageError(f"post: callbacks.{self.callback} has averaged nothing")
        averages[self.callback].give()
