"""What a policy gets when it acts by itself."""

from typing import TYPE_CHECKING

from torch import Tensor

from techniques.callback import probing

if TYPE_CHECKING:
    from training.run import Run


class Rollout:
    """Records at every evaluation the mean reward of rollouts of the model as a policy, as
    `probe/rollout/reward`, and that of the worst rollout, as `probe/rollout/worst`.

    Raises:
        ValueError: at the start, for a task without `rewards`.

    Source: the measurement of "Butterfly Effects of SGD Noise: Error Amplification in Behavior
    Cloning and Autoregression", arXiv 2310.11428, a mean over 20 initial states.
    """

    def on_fit_start(self, run: "Run") -> None:
        """Look for the rollouts."""
        if not hasattr(run.task, "rewards"):
            raise ValueError("callbacks: study.probes.rollout needs a task to act in, as pendulum")

    def on_eval_end(self, run: "Run") -> None:
        """Act and record."""

        def policy(features: Tensor) -> Tensor:
            batch = {"features": features.to(run.device)}
            return run.objective.predict(batch)["logits"][:, 0].float()

        with probing.looking(run):
            rewards = run.task.rewards(policy)
        run.record(
            {
                "probe/rollout/reward": float(rewards.mean()),
                "probe/rollout/worst": float(rewards.min()),
            }
        )
