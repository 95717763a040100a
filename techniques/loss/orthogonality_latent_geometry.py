"""M-FLAG's alignment of images with their captions."""

from typing import Any

from torch import Tensor

from tasks.pairs import embeddings
from training.errors import UsageError


def alignment(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """4·(1 − cos(image, caption)), one value a pair: 2 − 2·cos twice, as the authors count it.

    There are no negatives. Between 0, where each image points as its caption does, and 8; one
    direction for all is a minimiser too, so that the loss alone may collapse. It does not depend on
    the lengths of the embeddings; its gradient falls with them and vanishes at cosines of ±1.

    Shapes: `image_embeds` and `text_embeds` (batch, embedding) to losses (batch,).

    Raises:
        UsageError: for a task without captions.

    Source: "M-FLAG: Medical Vision-Language Pre-training with Frozen Language Models and Latent
    Space Geometry Optimization", arXiv 2307.08347;
    https://github.com/cheliu-computation/M-FLAG-MICCAI2023, `utils/utils_trainer.py`
    (`align_loss`).
    """
    images, texts = embeddings(outputs)
    if texts is None:
        raise UsageError("task.loss: alignment needs images with captions; see task.text_column")
    return 4 * (1 - (images * texts).sum(1))
