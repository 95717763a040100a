"""M-FLAG's frozen language model."""

from torch import nn

from training.errors import UsageError


def freeze_text(model: nn.Module) -> None:
    """Train no weight of the model's text transformer; its projection is trained.

    Raises:
        UsageError: for a model without one.

    Source: as `techniques.penalty.orthogonality_latent_geometry`; `utils/utils_builder.py`
    (`get_text_emb`) and `pretrain/config.yaml` (`free_layers: 12`, all of them).
    """
    text = getattr(model, "text", None)
    if not isinstance(text, nn.Module):
        raise UsageError("reparam.freeze_text: the model has no text transformer (model=dual has)")
    text.requires_grad_(False)
