"""How far averages that are made after training are from ones that are tracked."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from techniques.callback.posthoc_ema import PowerEMA
from training.errors import UsageError
from training.parallel import whole

if TYPE_CHECKING:
    from training.run import Run


class ReconstructionError:
    """Tracks power-function averages of some lengths, and records at every evaluation how far what
    `techniques.callback.posthoc_ema` reconstructs is from them, as `probe/reconstruction/<σ>`: the
    norm of the difference over the norm of the average's difference from the weights.

    Args:
        sigma_rel: lengths, other than those that the callback tracks.
        callback: its name.

    Raises:
        ValueError: for a length outside (0, 0.289), or none.
        UsageError: at the start, when the callback is not a `PowerEMA`.
    """

    def __init__(self, sigma_rel: Sequence[float], callback: str = "posthoc_ema") -> None:
        self.direct = PowerEMA(sigma_rel, every=sys.maxsize)
        self.callback = callback

    def on_fit_start(self, run: "Run") -> None:
        """Look for the callback, and follow the parameters."""
        if not isinstance(run.callbacks.get(self.callback), PowerEMA):
            raise UsageError(f"callbacks: {self.callback} is not a PowerEMA")
        self.direct.on_fit_start(run)

    def on_step_end(self, run: "Run") -> None:
        """Track."""
        self.direct.on_step_end(run)

    def on_eval_end(self, run: "Run") -> None:
        """Reconstruct and compare."""
        weights = {n: whole(p.detach()).cpu() for n, p in run.objective.named_parameters()}
        for sigma, average in self.direct.averages.items():
            made = run.callbacks[self.callback].reconstruct(run, sigma)
            apart, away = 0.0, 0.0
            for name, tensor in average.tensors.items():
                tracked = whole(tensor).cpu().double()
                apart += float((made[name] - tracked).square().sum())
                away += float((weights[name] - tracked).square().sum())
            run.record({f"probe/reconstruction/{sigma:g}": (apart / away) ** 0.5 if away else 0.0})

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return self.direct.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.direct.load_state_dict(state)
