"""An autoencoder, plain or variational, and its loss."""

from typing import Any

import torch
from torch import Tensor, nn

from models.layers import Factory
from models.mlp import hidden_layers, input_size, the_one_given
from models.outputs import Outputs


class Autoencoder(nn.Module):
    """Hidden layers down to a small latent vector and, mirrored, back up to the input.

    The variational one ("Auto-Encoding Variational Bayes", arXiv 1312.6114) maps the input to a
    normal distribution with mean μ and log-variance log σ², and decodes μ + σ·ε, ε ~ N(0, I), in
    training and μ in evaluation. Takes `features` (batch, in_features) or `pixel_values` (batch,
    channels, height, width).

    Args:
        in_features: numbers per sample; default: `in_channels`·`image_size`².
        in_channels, image_size: for tasks on images.
        width, depth: features of a hidden layer; hidden layers of encoder and of decoder.
        latent: features of the latent vector.
        variational: whether the latent is a distribution.
        objective: what the task is to train it for; only "reconstruction" fits.
        activation, norm: the slots.

    Returns `logits`, the reconstruction, shaped like the input; `latent` (batch, latent). If
    variational also `mean` and `log_variance` (batch, latent), and `kl` (batch): the divergence of
    the latent distribution from N(0, I), in nats.

    Raises:
        ValueError: for another `objective`, a size below 1, or a task that gives no input size.
    """

    def __init__(
        self,
        in_features: int | None = None,
        in_channels: int | None = None,
        image_size: int | None = None,
        *,
        width: int,
        depth: int,
        latent: int,
        activation: Factory,
        norm: Factory,
        variational: bool = False,
        objective: str = "reconstruction",
    ) -> None:
        super().__init__()
        if objective != "reconstruction":
            raise ValueError(
                f"model.objective: an autoencoder needs 'reconstruction', got '{objective}'"
            )
        for name, value in {"width": width, "depth": depth, "latent": latent}.items():
            if value < 1:
                raise ValueError(f"model.{name}: must be at least 1, got {value}")
        size = input_size(in_features, in_channels, image_size)
        hidden = [width] * depth
        self.variational = variational
        self.encoder = hidden_layers([size, *hidden], activation, norm)
        self.to_latent = nn.Linear(width, 2 * latent if variational else latent)
        self.decoder = hidden_layers([latent, *hidden], activation, norm)
        self.to_input = nn.Linear(width, size)

    def forward(
        self, features: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> Outputs:
        x = the_one_given(features, pixel_values)
        latent = self.to_latent(self.encoder(x.flatten(1)))
        outputs = Outputs()
        if self.variational:
            mean, log_variance = latent.chunk(2, dim=-1)
            outputs = Outputs(mean=mean, log_variance=log_variance, kl=kl(mean, log_variance))
            latent = mean
            if self.training:
                latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        outputs["latent"] = latent
        outputs["logits"] = self.to_input(self.decoder(latent)).view_as(x)
        return outputs


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) summed over the last dimension: ½ Σ (μ² + σ² − log σ² − 1)."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(-1)


def reconstruction(outputs: Any, batch: dict[str, Any], beta: float = 1.0) -> Tensor:
    """½ ‖x − x̂‖² + `beta` · KL, one per sample; `task.loss` of an autoencoder.

    With beta 1 it is the negative evidence lower bound of a variational autoencoder whose decoder
    is normal with variance 1, up to the constant ½ log 2π per number; `beta` as in β-VAE (Higgins
    et al. 2017). A plain autoencoder has no KL term.
    """
    x = the_one_given(batch.get("features"), batch.get("pixel_values"))
    error = 0.5 * (outputs["logits"].float() - x).square().flatten(1).sum(-1)
    return error + beta * outputs["kl"].float() if "kl" in outputs else error
