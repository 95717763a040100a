"""How well latents and the alignment loss agree with a target distribution that is known."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from tasks.fetch import fetch
from techniques.penalty.flow_prior_alignment import FlowPriorAlignment, RingOfGaussians, mismatch
from training.data import move
from training.evaluate import spread
from training.objective import unshard
from training.parallel import reshard

if TYPE_CHECKING:
    from training.run import Run


class LatentLikelihood:
    """Records at each evaluation `probe/latent_nll`, the mean negative log-likelihood, in nats, of
    the validation samples' latents under the target.

    With the penalty `FlowPriorAlignment` also `probe/landscape`: Pearson's correlation, over a
    square grid of latents, of its value with the negative log-likelihood. The value is the mean
    over 200 times and noises, the same at each point.

    Args:
        target: factory of the target, which has two features and a `log_likelihood`.
        samples: evenly spaced validation samples; 1024.
        extent: the grid is [−extent, extent]²; 2.5 in the target's standard deviations, which is
            the range of its samples and a fifth beyond, as in the paper's figure.
        points: of the grid in each direction; 41.
    """

    def __init__(
        self,
        target: Callable[[], RingOfGaussians] = RingOfGaussians,
        samples: int = 1024,
        extent: float = 2.5,
        points: int = 41,
    ) -> None:
        self.target, self.samples = target(), samples
        axis = torch.linspace(-extent, extent, points)
        self.grid = torch.cartesian_prod(axis, axis)

    @torch.no_grad()
    def on_eval_end(self, run: "Run") -> None:
        """Measure both."""
        rows = fetch(run.task.validation, spread(len(run.task.validation), self.samples))
        batch = run.task.prepare(rows, torch.Generator().manual_seed(0), False)
        training = run.model.training
        run.model.eval()
        latents = run.objective.predict(move(batch, run.device))["latent"]
        run.model.train(training)
        reshard(run.model)
        run.record({"probe/latent_nll": self._nll(latents).mean().item()})
        for penalty in run.objective.penalty_modules:
            if isinstance(penalty, FlowPriorAlignment):
                run.record({"probe/landscape": self._landscape(penalty, run.device)})

    def _nll(self, latents: torch.Tensor) -> torch.Tensor:
        return -self.target.log_likelihood(latents.double())

    def _landscape(self, penalty: FlowPriorAlignment, device: torch.device) -> float:
        generator = torch.Generator().manual_seed(0)
        grid, total = self.grid.to(device), torch.zeros(len(self.grid), device=device)
        unshard(penalty)
        for _ in range(200):
            t, noise = torch.rand(1, generator=generator), torch.randn(1, 2, generator=generator)
            times, noises = t.to(device).expand(len(grid)), noise.to(device).expand_as(grid)
            total += mismatch(penalty.flow, grid, times, noises).mean(-1)
        reshard(penalty)
        return torch.corrcoef(torch.stack([total.double(), self._nll(grid)]))[0, 1].item()
