"""What holds for every model: shapes on each task's dimensions, and a gradient everywhere."""

import pytest
import torch

from tests.models.conftest import CIFAR, DIGITS, TEXT
from training.configs import options

SMALL = {"width": 16, "depth": 2, "heads": 2}
TABLE = {"in_features": 6, "out_features": 3}

CASES = {
    "gpt on text": ("gpt", TEXT, SMALL, {"logits": (4, 12, 23)}),
    "gpt, tied": ("gpt", TEXT, {**SMALL, "tie_embeddings": True}, {"logits": (4, 12, 23)}),
    "encoder on text": ("encoder", TEXT, SMALL, {"logits": (4, 12, 23)}),
    "vit on digits": ("vit", DIGITS, SMALL, {"logits": (4, 10)}),
    "vit on CIFAR": ("vit", CIFAR, SMALL, {"logits": (4, 10)}),
    "vit, mean": ("vit", DIGITS, {**SMALL, "pool": "mean"}, {"logits": (4, 10)}),
    "resnet on digits": ("resnet", DIGITS, {"width": 4, "depth": 1}, {"logits": (4, 10)}),
    "resnet on CIFAR": ("resnet", CIFAR, {"width": 4, "depth": 2}, {"logits": (4, 10)}),
    "mlp on a table": ("mlp", TABLE, {"width": 16}, {"logits": (4, 3)}),
    "mlp, linear": ("mlp", TABLE, {"depth": 0}, {"logits": (4, 3)}),
    "mlp on images": ("mlp", DIGITS, {"width": 16}, {"logits": (4, 10)}),
    "ensemble on a table": (
        "stochastic",
        {**TABLE, "noise_features": 4},
        {"width": 16, "zero_init": False},
        {"logits": (4, 5, 3)},
    ),
    "autoencoder of a table": ("autoencoder", TABLE, {"latent": 2}, {"logits": (4, 6)}),
    "autoencoder of images": ("autoencoder", DIGITS, {}, {"logits": (4, 1, 8, 8)}),
    "variational": ("autoencoder", DIGITS, {"variational": True}, {"logits": (4, 1, 8, 8)}),
    "views": ("dual", CIFAR, {**SMALL, "embedding": 7}, {"logits": (4, 7)}),
    "captions": (
        "dual",
        CIFAR | TEXT,
        {**SMALL, "embedding": 7},
        {"image_embeds": (4, 7), "text_embeds": (4, 7)},
    ),
    "abmil on bags": (
        "abmil",
        DIGITS | {"instances": 5},
        SMALL,
        {"logits": (4, 10), "attention": (4, 2, 5)},
    ),
    "hf on text": ("hf", TEXT, SMALL, {"logits": (4, 12, 23)}),
    "hf on images": (
        "hf",
        CIFAR,
        {**SMALL, "config": {"model_type": "vit"}, "auto": "image_classification"},
        {"logits": (4, 10)},
    ),
    "timm on CIFAR": (
        "timm",
        CIFAR,
        {**SMALL, "name": "vit_tiny_patch16_224", "keys": {"patch_size": 8}},
        {"logits": (4, 10)},
    ),
}


def batch(dims, generator):
    inputs = {}
    if "vocab_size" in dims:
        shape = (4, dims["context_length"])
        inputs["input_ids"] = torch.randint(dims["vocab_size"], shape, generator=generator)
    if "image_size" in dims:
        bag = (dims["instances"],) if "instances" in dims else ()
        shape = (4, *bag, dims["in_channels"], dims["image_size"], dims["image_size"])
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if "in_features" in dims:
        inputs["features"] = torch.randn(4, dims["in_features"], generator=generator)
    if "noise_features" in dims:
        inputs["noise"] = torch.randn(4, 5, dims["noise_features"], generator=generator)
    return inputs


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_gradients(case, build, generator):
    name, dims, keys, expected = CASES[case]
    model = build(name, dims, **keys)
    outputs = model(**batch(dims, generator))
    assert {key: tuple(outputs[key].shape) for key in expected} == expected

    directions = [torch.randn(outputs[key].shape, generator=generator) for key in expected]
    loss = sum((outputs[key] * way).sum() for key, way in zip(expected, directions))
    if "kl" in outputs:
        loss = loss + outputs["kl"].sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("case", [case for case in CASES if case != "variational"])
def test_samples_do_not_see_each_other(case, build, generator):
    name, dims, keys, expected = CASES[case]
    model = build(name, dims, **keys).eval()
    inputs = batch(dims, generator)
    together, alone = model(**inputs), model(**{k: v[:1] for k, v in inputs.items()})
    for key in expected:
        torch.testing.assert_close(together[key][:1], alone[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt", "encoder", "vit", "resnet", "mlp", "dual"])
def test_every_activation_and_norm_comes_from_its_slot(name, build):
    """Of the activations and norms PyTorch has, only those that were asked for are there."""
    sizes = {"width": 4} if name in ("resnet", "mlp") else SMALL
    norm = {"_target_": "torch.nn.BatchNorm2d" if name == "resnet" else "torch.nn.RMSNorm"}
    keys = {**sizes, "activation": {"_target_": "torch.nn.Softsign"}, "norm": norm}
    if name == "dual":
        keys["head"] = {"_target_": "torch.nn.Linear"}
    model = build(name, TEXT | CIFAR, **keys)
    foreign = (torch.nn.GELU, torch.nn.ReLU, torch.nn.LayerNorm)
    assert not [m for m in model.modules() if isinstance(m, foreign)]
    assert [m for m in model.modules() if isinstance(m, torch.nn.Softsign)]


MISTAKES = {
    "width": ("gpt", {**SMALL, "width": 0}),
    "depth": ("encoder", {**SMALL, "depth": 0}),
    "heads": ("vit", {**SMALL, "heads": 3}),
    "patch_size": ("vit", {**SMALL, "patch_size": 5}),
    "pool": ("vit", {**SMALL, "pool": "max"}),
    "model.width": ("resnet", {"width": 0}),
    "model.depth": ("mlp", {"depth": -1}),
    "latent": ("autoencoder", {"latent": 0}),
    "embedding": ("dual", {**SMALL, "embedding": 0}),
    "masked": ("encoder", {**SMALL, "objective": "causal"}),
    "reconstruction": ("autoencoder", {"objective": "classification"}),
}


@pytest.mark.parametrize("named", MISTAKES)
def test_a_mistake_is_named(named, build):
    name, keys = MISTAKES[named]
    with pytest.raises(ValueError, match=named):
        build(name, TEXT | CIFAR, **keys)


@pytest.mark.parametrize("name", ["mlp", "autoencoder"])
def test_needs_an_input_size(name, build):
    with pytest.raises(ValueError, match="in_features"):
        build(name, {"out_features": 2})


@pytest.mark.parametrize("name", ["gpt", "encoder"])
def test_refuses_a_sequence_that_is_too_long(name, build):
    with pytest.raises(ValueError, match="at most 12 tokens, got 13"):
        build(name, TEXT, **SMALL)(input_ids=torch.zeros(1, 13, dtype=torch.long))


def test_every_config_is_covered():
    elsewhere = {"transducer"}  # test_transducer.py: its inputs and outputs are its own
    assert {name for name, *_ in CASES.values()} | elsewhere == set(options("model"))
