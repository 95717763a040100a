import models.torchvision_ops  # noqa: F401

# isort: split
import pytest
import torch
import transformers

from techniques.reparam.selective_layer_tuning_lmm import selective_layer_tuning_lmm
from training.assemble import assemble
from training.compose import compose
from training.trainer import Step

TINY = [
    *("task.path=json", "task.context_length=8", "model.width=8", "model.depth=2", "model.heads=2"),
    *("trainer.device=cpu", "schedule.warmup=0", "tracker=none"),
]
SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": ({**SIZES, "intermediate_size": 12, "attention_bias": True}, "self_attn", "mlp"),
    "qwen2": ({**SIZES, "intermediate_size": 12, "num_key_value_heads": 1}, "self_attn", "mlp"),
    "phi3": ({**SIZES, "intermediate_size": 12, "pad_token_id": 0}, "self_attn", "mlp"),
    "gpt2": ({"vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2}, "attn", "mlp"),
    "gpt_neox": ({**SIZES, "intermediate_size": 12}, "attention", "mlp"),
}
DOWN = ("down_proj", "mlp.c_proj", "dense_4h_to_h", "ffn.down")
OUT = ("o_proj", "attn.c_proj", "attention.dense", "attention.out")


def built(family):
    """A model, and what its layers of attention and feed-forward are called."""
    if family == "ours":
        gated = "model.ffn._target_=models.feedforward.GatedFeedForward"
        return assemble(compose([*TINY, gated])).model, "attention", "ffn"
    sizes, attention, mlp = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config), attention, mlp


@pytest.mark.parametrize("family", ["ours", *FAMILIES])
def test_finds_the_layers_of_every_family(family):
    """By name, as a walk over the modules finds them: what an attention module has, what a
    feed-forward has, and of these the layer that is last."""
    model, attention, mlp = built(family)
    inside = {attention: set(), mlp: set()}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in inside:
            inside[name.rpartition(".")[2]] |= {f"{name}.{n}" for n, _ in module.named_parameters()}
    of = {name: {n for n in inside[mlp] if any(d in n for d in DOWN)} for name in ["down"]}
    of |= {"attention": inside[attention], "mlp": inside[mlp], "gate_up": inside[mlp] - of["down"]}
    of |= {"qkv": {n for n in inside[attention] if not any(o in n for o in OUT)}}
    of |= {("qkv", "gate_up"): of["qkv"] | of["gate_up"]}
    for parts, expected in of.items():
        selective_layer_tuning_lmm(model, parts=[parts] if isinstance(parts, str) else parts)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == expected
        assert trained


def test_is_the_selection_of_the_authors_readme():
    """Their few lines, on a model of their family."""
    keys = {
        "attention": tuple(f"self_attn.{x}_proj" for x in "qkvo"),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for part, wanted in keys.items():
        model = built("qwen2")[0]
        selective_layer_tuning_lmm(model, parts=[part])
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == any(key in name for key in wanted)


def test_nothing_else_moves():
    part = "reparam.selective_layer_tuning_lmm.parts=[gate_up]"
    run = assemble(compose([*TINY, "technique=selective_layer_tuning_lmm", part]))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    Step(run)(run.batches[0])
    moved = {name for name, p in run.model.named_parameters() if not p.equal(before[name])}
    assert moved
    assert all(".ffn.up." in name for name in moved)


def test_mistakes():
    model = built("gpt2")[0]
    for parts in ([], ["head"], ["mlp", "head"]):
        with pytest.raises(ValueError, match=r"^parts: some of attention, qkv, gate_up, down, mlp"):
            selective_layer_tuning_lmm(model, parts=parts)
    with pytest.raises(ValueError, match=r"^parts: no parameter of the model is named as 'qkv'"):
        selective_layer_tuning_lmm(torch.nn.Linear(2, 2), parts=["qkv"])
