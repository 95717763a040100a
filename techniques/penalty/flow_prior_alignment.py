"""Alignment of latents with a distribution that a frozen flow-matching model has learnt."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.losses import precise
from training.errors import UsageError


class Target(Protocol):
    """What the latents are to be distributed as."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """So many samples (count, dim), float32."""
        ...


class RingOfGaussians:
    """The authors' toy: a mixture of Gaussians on a circle, scaled to unit standard deviation.

    Args:
        components: 5; equally likely, at least 2.
        radius: of the circle, before scaling; 3.
        scale: standard deviation of a component, before scaling; 0.3.

    Raises:
        ValueError: for fewer than two components, or a setting that is not positive.

    Source: `toy_examples/flow_train_then_guide.py` (`MixtureOfGaussians`).
    """

    def __init__(self, components: int = 5, radius: float = 3.0, scale: float = 0.3) -> None:
        if components < 2:
            raise ValueError(f"components: must be at least 2, got {components}")
        for name, value in {"radius": radius, "scale": scale}.items():
            if value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        spread = math.sqrt(radius**2 / 2 + scale**2)
        angles = torch.arange(components, dtype=torch.float64) * 2 * math.pi / components
        self.means = radius / spread * torch.stack([angles.cos(), angles.sin()], dim=1)
        self.scale = scale / spread

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 2)."""
        chosen = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        return self.means[chosen].float() + self.scale * noise

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Log-density in nats: (..., 2) to (...)."""
        squares = (x[..., None, :] - self.means.to(x)).square().sum(-1)
        constant = math.log(2 * math.pi * self.scale**2 * len(self.means))
        return (-squares / (2 * self.scale**2)).logsumexp(-1) - constant


class Features:
    """Rows of a file, scaled to unit standard deviation, such as embeddings of text.

    Args:
        path: of a `.npy` array (rows, dim), floating-point.
        dim: project at random to so many features, by a fixed matrix of N(0, 1 / old dim); default:
            as they are.

    Raises:
        ValueError: for a file that is not such an array.

    Source: `train/train_flow_head.py` (`FixedProjection`, `vae_scaling_factor`).
    """

    def __init__(self, path: str, dim: int | None = None) -> None:
        try:
            rows = np.load(Path(path), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"path: {path} is not a readable .npy file") from error
        if rows.ndim != 2 or not len(rows) or not np.issubdtype(rows.dtype, np.floating):
            raise ValueError(f"path: expected real rows (rows, dim), got {rows.dtype} {rows.shape}")
        features = torch.from_numpy(rows).float()
        features = features / features.std()
        if dim is not None:
            width = features.shape[1]
            generator = torch.Generator().manual_seed(42)
            features = features @ (torch.randn(width, dim, generator=generator) * width**-0.5)
        self.features = features

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, dim), with replacement."""
        return self.features[torch.randint(len(self.features), (count,), generator=generator)]


class FlowPriorAlignment(nn.Module):
    """E ‖v(xₜ, t) − (ε − x)‖² / dim, xₜ = (1 − t)·x + t·ε, t ~ U[0, 1], ε ~ N(0, I), x a latent.

    It is the objective of flow matching with the latents to be optimised instead of the flow v,
    which was trained on the target and is frozen: a surrogate of a lower bound on the latents'
    log-likelihood under it, without an ODE to solve. Gradients reach a latent through the flow too.

    The flow is trained when the penalty is built, on the CPU, from `seed` alone and without
    disturbing the run's random numbers; its weights are frozen parameters, so a checkpoint has
    them. As in the authors' code it is a residual MLP modulated by the time.

    Minimiser: for a target N(μ, s²·I) and its exact flow the penalty is a·‖x − μ‖² / dim + b with
    a and b functions of s, as the negative log-likelihood is; of a mixture its minima are near the
    modes, so latents become denser there than the target is. Range: from b, the flow's
    irreducible loss, to ∞: there is no bound on how far latents may be, and far from the target it
    grows about with their square, as the flow extrapolates. Latents of 10⁴ give a
    finite value and gradient in float32.

    Args:
        target: factory of a `Target`.
        draws: times and noises for each latent and step; 4 (`flow_mul`).
        width, depth: of the flow; 1024 and 6 for the authors' image tokenizer, 512 and 4 for their
            toy. The defaults, 64 and 2, train in a second or two.
        steps, batch_size, lr: of its training, with Adam. Their toy has 100 000, 256 and 1e-4.
        seed: of its training.

    The overlay's coefficient is the authors', 0.01, beside a mean squared error of the pixels of
    weight 1; `models.autoencoder.reconstruction` is half their sum, hence larger.

    Shapes: `latent` (..., dim) of the outputs to a scalar, the mean over latents, draws and dim.

    Raises:
        ValueError: for a setting that is not positive.
        UsageError: for a model without latents, or with latents of another size than the target's.

    Source: "Aligning Latent Spaces with Flow Priors", arXiv 2506.05240;
    https://github.com/liyz15/Aligning-Latent-Spaces-with-Flow-Priors,
    `continuous_tokenizer/modelling/flowloss.py` (`FlowLoss`), `losses/vq_flow_loss.py` and the
    configuration `flowae-adv-qwen-proj-head-w-1e2-l-64.yaml`.
    """

    def __init__(
        self,
        target: Callable[[], Target] = RingOfGaussians,
        draws: int = 4,
        width: int = 64,
        depth: int = 2,
        steps: int = 300,
        batch_size: int = 256,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        settings = {"draws": draws, "width": width, "depth": depth, "steps": steps}
        settings |= {"batch_size": batch_size, "lr": lr}
        for name, value in settings.items():
            if value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        self.draws = draws
        self.flow = pretrained(
            target(), width, depth, steps=steps, batch_size=batch_size, lr=lr, seed=seed
        )

    def forward(self, model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
        if "latent" not in outputs:
            raise UsageError(
                "penalties.flow_prior_alignment: needs a model that returns `latent`, such as "
                f"model=autoencoder; this one returns {', '.join(outputs)}"
            )
        latents = outputs["latent"]
        dim = self.flow.dim
        if latents.shape[-1] != dim:
            raise UsageError(
                f"penalties.flow_prior_alignment.target: its samples have {dim} features, the "
                f"model's latents {latents.shape[-1]}"
            )
        latents = precise(latents).flatten(0, -2)
        latents = latents.repeat(self.draws, 1)
        t, noise = latents.new_empty(len(latents)).uniform_(), torch.randn_like(latents)
        with torch.autocast(latents.device.type, enabled=False):
            return mismatch(self.flow, latents, t, noise).mean()


def mismatch(flow: nn.Module, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """(v(xₜ, t) − (ε − x))², of x and ε (rows, dim) and t (rows,): (rows, dim)."""
    at = t[:, None]
    return (flow((1 - at) * x + at * noise, t) - (noise - x)).square()


class VelocityField(nn.Module):
    """A residual MLP whose blocks are modulated by the time (adaLN); it begins as 0.

    Shapes: x (rows, dim) and t (rows,) in [0, 1] to (rows, dim).
    """

    def __init__(self, dim: int, width: int, depth: int, frequencies: int = 128) -> None:
        super().__init__()
        self.dim = dim
        powers = torch.arange(frequencies) / frequencies
        self.register_buffer("frequencies", 10_000.0**-powers, persistent=False)
        self.time = nn.Sequential(
            nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.enter = nn.Linear(dim, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.modulations = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, dim)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        for layer in (*self.modulations, self.last_modulation, self.leave):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies  # type: ignore[operator]
        time = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)))
        h = self.enter(x)
        for norm, mlp, modulation in zip(self.norms, self.mlps, self.modulations):
            shift, scale, gate = modulation(time).chunk(3, dim=-1)
            h = h + gate * mlp(norm(h) * (1 + scale) + shift)
        shift, scale = self.last_modulation(time).chunk(2, dim=-1)
        return self.leave(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def pretrained(
    target: Target, width: int, depth: int, *, steps: int, batch_size: int, lr: float, seed: int
) -> VelocityField:
    """A flow from the target at t = 0 to N(0, I) at t = 1, frozen; a function of the arguments."""
    generator = torch.Generator().manual_seed(seed)
    # Layers draw their weights from the CPU's global generator.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        flow = VelocityField(target.sample(1, generator).shape[-1], width, depth)
        optimizer = torch.optim.Adam(flow.parameters(), lr=lr, fused=True)
        for _ in range(steps):
            x = target.sample(batch_size, generator)
            t = torch.rand(batch_size, generator=generator)
            noise = torch.randn(x.shape, generator=generator)
            optimizer.zero_grad()
            mismatch(flow, x, t, noise).mean().backward()
            optimizer.step()
    return flow.requires_grad_(False)
