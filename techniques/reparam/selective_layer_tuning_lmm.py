"""Selective tuning: which layers of a transformer learn a new skill."""

import re
from collections.abc import Sequence

from torch import nn

ATTENTION = r"(self_attn|self_attention|attention|attn)\."
MLP = r"(mlp|ffn)\."
PARTS = {
    "attention": ATTENTION
    + r"(qkv|out|[qkvo]_proj|qkv_proj|c_attn|c_proj|query_key_value|dense)\.",
    "qkv": ATTENTION + r"(qkv|[qkv]_proj|qkv_proj|c_attn|query_key_value)\.",
    "gate_up": MLP + r"(gate|up|gate_proj|up_proj|gate_up_proj|c_fc|dense_h_to_4h)\.",
    "down": MLP + r"(down|down_proj|c_proj|dense_4h_to_h)\.",
    "mlp": MLP,
}
"""Names of parameters: ours, and those of the Llama family, Phi-3, GPT-2 and GPT-NeoX."""


def selective_layer_tuning_lmm(model: nn.Module, *, parts: Sequence[str] = ("attention",)) -> None:
    """Train only some layers of every block, weights and biases; all else stays as it is: the
    embeddings, norms and output layer too.

    The two that the authors recommend are "attention", which forgets least, and "gate_up", the
    feed-forward's first layers with the last one frozen, which learns more. Where a feed-forward
    has no gate it is its first layer alone, as they do in the vision tower.

    Args:
        model: changed in place; a transformer whose layers are named as `PARTS` has them.
        parts: one or several of
            "attention": the projections of self-attention to queries, keys, values and output;
            "qkv": without the output's;
            "gate_up": the feed-forward's layers into its hidden features;
            "down": its layer out of them;
            "mlp": all of the feed-forward.

    Raises:
        ValueError: for no parts, another part, or one that the model does not have.

    Source: "How to Teach Large Multimodal Models New Skills", arXiv 2510.08564;
    https://github.com/jessemelpolio/LMM_CL, `llava/train/train.py`.
    """
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"parts: some of {', '.join(PARTS)}, got {list(parts)}")
    found = {part: _named(model, PARTS[part]) for part in parts}
    for part, parameters in found.items():
        if not parameters:
            raise ValueError(f"parts: no parameter of the model is named as '{part}' has them")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameters in found.values():
        for parameter in parameters:
            parameter.requires_grad_(True)


def _named(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    search = re.compile(rf"(^|\.){pattern}").search
    return [parameter for name, parameter in model.named_parameters() if search(name)]
