"""Text from a language model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[dict[str, Any]], Any]
Decode = Callable[[Tensor, Tensor], Tensor]
"""`(input_ids, scores) -> scores`, as `transformers` calls its logits processors: (batch, length)
and (batch, vocabulary); what may not be drawn gets −∞."""


@torch.no_grad()
def continued(
    predict: Predict,
    tokens: Tensor,
    count: int,
    generator: torch.Generator,
    decode: Decode | None = None,
    context_length: int | None = None,
) -> Tensor:
    """Tokens (batch, length) with `count` more, each drawn from what the model makes of those
    before it.

    Args:
        predict: the model, from `input_ids` to outputs with `logits`, in evaluation mode.
        tokens: int64, at least one in each row.
        count: how many more.
        generator: of random numbers, on the CPU.
        decode: changes the logits of the next token first; default: not at all.
        context_length: of the model, which sees the last so many tokens; default: all.
    """
    for _ in range(count):
        seen = tokens if context_length is None else tokens[:, -context_length:]
        scores = predict({"input_ids": seen})["logits"][:, -1].float()
        if decode is not None:
            scores = decode(tokens, scores)
        drawn = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)], dim=1)
    return tokens
