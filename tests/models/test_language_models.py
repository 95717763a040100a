import pytest
import torch
import torch.nn.functional as F
import yaml

from models.hf import HF
from tests.models.conftest import TEXT

SMALL = {"width": 16, "depth": 2, "heads": 4}


def tokens(generator, rows=3):
    return torch.randint(TEXT["vocab_size"], (rows, TEXT["context_length"]), generator=generator)


def test_gpt_sees_only_the_past(build, generator):
    model, ids = build("gpt", TEXT, **SMALL).double(), tokens(generator)
    other = ids.clone()
    other[:, 7] = (ids[:, 7] + 1) % TEXT["vocab_size"]
    changed = (model(ids)["logits"] != model(other)["logits"]).any(-1).any(0)
    assert changed.tolist() == [False] * 7 + [True] * 5


def test_encoder_sees_everything(build, generator):
    model, ids = build("encoder", TEXT, **SMALL).double(), tokens(generator)
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % TEXT["vocab_size"]
    assert (model(ids)["logits"] != model(other)["logits"]).any(-1).all()


@pytest.mark.parametrize("name", ["gpt", "encoder"])
def test_padding_changes_nothing(name, build, generator):
    """A padded sequence gives what the sequence alone gives, whatever the padding is."""
    model, ids = build(name, TEXT, **SMALL).double(), tokens(generator)
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    padded = model(ids, mask)["logits"][:, :9]
    torch.testing.assert_close(padded, model(ids[:, :9])["logits"])


@pytest.mark.parametrize("name", ["gpt", "encoder"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameter_count(name, tied, build):
    w, d, v, c = SMALL["width"], SMALL["depth"], *TEXT.values()
    attention, feedforward, norm = 4 * w * w, 8 * w * w + 5 * w, 2 * w
    expected = (v + c) * w + d * (attention + feedforward + 2 * norm) + norm + (not tied) * v * w
    model = build(name, TEXT, **SMALL, tie_embeddings=tied)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_starts_near_the_uniform_distribution(build, generator):
    """The loss of an untrained model is the entropy of guessing, log of the vocabulary."""
    model, ids = build("gpt", TEXT, **SMALL), tokens(generator, rows=16)
    logits = model(ids)["logits"]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.tensor(TEXT["vocab_size"]).log().item(), rel=0.02)


def assert_same_function(ours, theirs, parameters, generator, **tolerance):
    """Equal logits, and equal gradients of `(ours, theirs)` pairs of parameters."""
    ids = tokens(generator)
    a, b = ours(ids)["logits"], theirs(input_ids=ids).logits
    torch.testing.assert_close(a, b, **tolerance)
    way = torch.randn(a.shape, generator=generator, dtype=a.dtype)
    (a * way).sum().backward()
    (b * way).sum().backward()
    for mine, other in parameters:
        torch.testing.assert_close(mine.grad, other.grad, **tolerance)


def test_equals_gpt2_of_transformers(build, generator):
    attention = {"_target_": "models.attention.SelfAttention", "bias": True}
    activation = {"_target_": "torch.nn.GELU", "approximate": "tanh"}
    keys = {"attention": attention, "activation": activation, "tie_embeddings": True}
    ours = build("gpt", TEXT, **SMALL, **keys).double().eval()
    theirs = HF(**TEXT, config={"model_type": "gpt2"}, **SMALL).model.double().eval()
    body = theirs.transformer
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        copy(ours.embedding, body.wte)
        ours.transformer.position.weight.copy_(body.wpe.weight)
        copy(ours.transformer.norm, body.ln_f)
        for mine, other in zip(ours.transformer.blocks, body.h):
            copy(mine.attention_norm, other.ln_1)
            copy(mine.ffn_norm, other.ln_2)
            copy(mine.attention.qkv, other.attn.c_attn, transpose=True)
            copy(mine.attention.out, other.attn.c_proj, transpose=True)
            copy(mine.ffn.up, other.mlp.c_fc, transpose=True)
            copy(mine.ffn.down, other.mlp.c_proj, transpose=True)
    pairs = [
        (ours.embedding.weight, body.wte.weight),
        (ours.transformer.position.weight, body.wpe.weight),
        (ours.transformer.blocks[0].attention.qkv.bias, body.h[0].attn.c_attn.bias),
        (ours.transformer.norm.weight, body.ln_f.weight),
    ]
    assert_same_function(ours, theirs, pairs, generator)


def test_equals_llama_of_transformers(build, generator):
    """Rotary positions, RMSNorm, gated feed-forward and grouped queries at once."""
    config = {"model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 40}
    theirs = HF(**TEXT, config=config, **SMALL).model.double().eval()
    slots = """
    attention: {_target_: models.attention.SelfAttention, kv_heads: 2}
    activation: {_target_: torch.nn.SiLU}
    norm: {_target_: torch.nn.RMSNorm, eps: 1.0e-6}
    ffn: {_target_: models.feedforward.GatedFeedForward, expansion: 2.5}
    position: {_target_: models.position.Rotary}
    """
    ours = build("gpt", TEXT, **SMALL, **yaml.safe_load(slots)).double().eval()
    body = theirs.model
    with torch.no_grad():
        copy(ours.embedding, body.embed_tokens)
        copy(ours.transformer.norm, body.norm)
        copy(ours.head, theirs.lm_head)
        for mine, other in zip(ours.transformer.blocks, body.layers):
            copy(mine.attention_norm, other.input_layernorm)
            copy(mine.ffn_norm, other.post_attention_layernorm)
            attn = other.self_attn
            qkv = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight])
            mine.attention.qkv.weight.copy_(qkv)
            copy(mine.attention.out, attn.o_proj)
            copy(mine.ffn.gate, other.mlp.gate_proj)
            copy(mine.ffn.up, other.mlp.up_proj)
            copy(mine.ffn.down, other.mlp.down_proj)
    pairs = [
        (ours.embedding.weight, body.embed_tokens.weight),
        (ours.transformer.blocks[1].ffn.gate.weight, body.layers[1].mlp.gate_proj.weight),
        (ours.transformer.blocks[0].attention.out.weight, body.layers[0].self_attn.o_proj.weight),
    ]
    # Llama's norms and angles are 32-bit whatever the model is.
    assert_same_function(ours, theirs, pairs, generator, rtol=1e-5, atol=1e-5)


def copy(mine, other, transpose=False):
    mine.weight.copy_(other.weight.T if transpose else other.weight)
    if getattr(mine, "bias", None) is not None:
        mine.bias.copy_(other.bias)
