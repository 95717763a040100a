"""Models of transformers and timm, and modules replaced in them."""

import subprocess
import sys

import models.torchvision_ops  # noqa: F401

# isort: split
import pytest
import timm
import torch
import transformers
from torch import nn

from models.hf import HF
from models.swap import swap_activations, swap_norms
from models.timm import Timm
from tests.models.conftest import CIFAR, DIGITS, TEXT

SMALL = {"width": 16, "depth": 2, "heads": 4}
LLAMA = {"config": {"model_type": "llama"}, **SMALL}


def ids(generator):
    return torch.randint(TEXT["vocab_size"], (3, TEXT["context_length"]), generator=generator)


def images(dims, generator):
    size = dims["image_size"]
    return torch.randn(2, dims["in_channels"], size, size, generator=generator)


class Scaled(nn.Module):
    """ReLU with a factor for each channel, of the last dimension."""

    def __init__(self, channels):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return self.factor * x.clamp(min=0)


# transformers


@pytest.mark.parametrize(
    ("config", "fused"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "qwen3"}, True),
        ({"model_type": "mamba"}, True),
        ({"model_type": "gemma2"}, False),  # caps its logits
        ({"model_type": "granite", "logits_scaling": 2.0}, False),
        ({"model_type": "cohere"}, False),  # scales them
    ],
)
def test_logits_are_those_of_transformers(config, fused, generator):
    """Split into hidden states and classifier only where that is all there is to the logits."""
    sizes = {"width": 16, "depth": 2} if config["model_type"] == "mamba" else SMALL
    model = HF(**TEXT, config=config, **sizes).eval()
    with torch.no_grad():  # large enough for a cap to bite
        model.model.get_output_embeddings().weight.mul_(30)
    x = ids(generator)
    outputs = model(input_ids=x)
    assert ("hidden" in outputs) == fused
    torch.testing.assert_close(outputs["logits"], model.model(input_ids=x).logits)


def test_takes_what_the_model_takes_but_never_labels():
    assert HF(**TEXT, **LLAMA).inputs == {"input_ids", "attention_mask"}
    config = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4], "depths": [1]}
    assert HF(**CIFAR, config=config, auto="image_classification").inputs == {"pixel_values"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", "bert", "roberta"])
def test_sizes_and_dimensions_reach_the_configuration(kind):
    masked = kind in ("bert", "roberta")
    mode = {"auto": "masked_lm", "objective": "masked"} if masked else {}
    config = HF(**TEXT, config={"model_type": kind}, **SMALL, **mode).model.config
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert sizes == (16, 2, 4)
    assert config.vocab_size == TEXT["vocab_size"]
    # RoBERTa's positions start after the padding token, which is 1.
    assert config.max_position_embeddings == TEXT["context_length"] + 2 * (kind == "roberta")


def test_a_width_keeps_the_proportions_of_the_type():
    """Mistral-7B: feed-forward 14336 of 4096, 8 key-value heads of 32."""
    config = HF(**TEXT, config={"model_type": "mistral"}, width=64, depth=2, heads=8).model.config
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (224, 2, 8)


def test_a_key_of_the_configuration_wins_under_either_name():
    for key in ("n_embd", "hidden_size"):
        config = {"model_type": "gpt2", key: 24}
        assert HF(**TEXT, config=config, heads=2, depth=1).model.config.n_embd == 24


def test_a_saved_folder_is_read_by_transformers_and_by_path(tmp_path, generator):
    model = HF(**TEXT, **LLAMA).eval()
    model.save_pretrained(tmp_path)
    x = ids(generator)
    expected = model(input_ids=x)["logits"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=x).logits, expected)
    loaded = HF(**TEXT, path=str(tmp_path), pretrained=True).eval()
    torch.testing.assert_close(loaded(input_ids=x)["logits"], expected)

    fresh = HF(**TEXT, path=str(tmp_path)).eval()
    assert fresh.model.config.hidden_size == 16
    assert not torch.allclose(fresh(input_ids=x)["logits"], expected)
    assert HF(**TEXT, path=str(tmp_path), depth=3).model.config.num_hidden_layers == 3


def test_pretrained_weights_must_fit_the_task(tmp_path):
    HF(**TEXT, **LLAMA).save_pretrained(tmp_path)
    path = {"path": str(tmp_path), "pretrained": True}
    with pytest.raises(ValueError, match=r"vocab_size is 23, the task needs 24"):
        HF(24, 12, **path)
    with pytest.raises(ValueError, match=r"model\.width: fixed by the weights"):
        HF(**TEXT, **path, width=32)
    with pytest.raises(ValueError, match=r"model\.config\.hidden_size: model\.path has its own"):
        HF(**TEXT, path=str(tmp_path), config={"model_type": "llama", "hidden_size": 8})


def test_pretrained_classifier_gets_the_tasks_classes(tmp_path, generator):
    config = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1}
    made = {"auto": "image_classification", "heads": 2}
    saved = HF(**CIFAR, config=config, **made)
    saved.save_pretrained(tmp_path)
    dims = CIFAR | {"num_classes": 7}
    model = HF(**dims, path=str(tmp_path), pretrained=True, auto="image_classification")
    assert model(pixel_values=images(CIFAR, generator))["logits"].shape == (2, 7)
    assert torch.equal(model.model.vit.embeddings.cls_token, saved.model.vit.embeddings.cls_token)
    fresh = HF(**dims, path=str(tmp_path), auto="image_classification")
    assert fresh(pixel_values=images(CIFAR, generator))["logits"].shape == (2, 7)
    with pytest.raises(ValueError, match="image_size is 32, the task's 8"):
        HF(**CIFAR | {"image_size": 8}, path=str(tmp_path), pretrained=True, auto=made["auto"])


MISTAKES = {
    "no 'lama'; did you mean 'llama'": {"config": {"model_type": "lama"}},
    "model.config: needs a model_type": {"config": {}},
    "model.config.hiden_size: .* did you mean 'hidden_size'": {
        "config": {"model_type": "llama", "hiden_size": 3}
    },
    "model.auto: no 'causal'; did you mean 'causal_lm'": {"auto": "causal"},
    "model.auto: .* 'vit'; it has: image_classification": {"config": {"model_type": "vit"}},
    "model.objective: 'causal' does not fit": {"auto": "masked_lm"},
    "model.objective: 'masked' does not fit": {"objective": "masked"},
    "could not build a llama: .*128": {"config": {"model_type": "llama"}, "heads": 3},
    "model.auto: image_classification needs images from the task": {
        "config": {"model_type": "vit"},
        "auto": "image_classification",
    },
    "model.heads: 'mamba' has no": {"config": {"model_type": "mamba"}, "heads": 2},
    "model.path: model.pretrained needs one": {"pretrained": True},
    "model.path: cannot read 'no/such-model'": {"path": "no/such-model"},
}


@pytest.mark.parametrize("told", MISTAKES)
def test_a_mistake_with_transformers_is_told_in_one_line(told):
    with pytest.raises(ValueError, match=told) as caught:
        HF(**TEXT, **MISTAKES[told])
    assert "\n" not in str(caught.value)


def test_a_missing_folder_names_its_nearest_neighbour(tmp_path):
    (tmp_path / "small-llama").mkdir()
    with pytest.raises(ValueError, match=r"no folder .*small-lama'; did you mean '.*small-llama'"):
        HF(**TEXT, path=str(tmp_path / "small-lama"))


# timm


@pytest.mark.parametrize("dims", [CIFAR, DIGITS], ids=["CIFAR", "digits"])
def test_timm_resnet_is_timms(dims, generator):
    torch.manual_seed(0)
    model = Timm(**dims, name="resnet18").eval()
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", in_chans=dims["in_channels"], num_classes=10).eval()
    x = images(dims, generator)
    torch.testing.assert_close(model(pixel_values=x)["logits"], theirs(x))


def test_timm_vit_is_told_size_width_depth_and_heads():
    model = Timm(**CIFAR, name="vit_tiny_patch16_224", keys={"patch_size": 4}, **SMALL).model
    assert model.patch_embed.num_patches == 64
    blocks = model.blocks
    assert (model.embed_dim, len(blocks), blocks[0].attn.num_heads) == (16, 2, 4)


def test_timm_checkpoint_is_loaded(tmp_path, generator):
    saved = Timm(**DIGITS, name="resnet18").eval()
    torch.save(saved.model.state_dict(), tmp_path / "weights.pt")
    model = Timm(**DIGITS, name="resnet18", checkpoint=str(tmp_path / "weights.pt")).eval()
    x = images(DIGITS, generator)
    assert torch.equal(model(pixel_values=x)["logits"], saved(pixel_values=x)["logits"])
    with pytest.raises(ValueError, match=r"no file .*weight.pt'; did you mean '.*weights.pt'"):
        Timm(**DIGITS, name="resnet18", checkpoint=str(tmp_path / "weight.pt"))


@pytest.mark.parametrize(
    ("told", "keys"),
    [
        ("no 'resnet_18'; did you mean 'resnet18'", {"name": "resnet_18"}),
        ("could not build 'resnet18': .*embed_dim", {"name": "resnet18", "width": 4}),
        ("does not work on images", {"name": "vit_tiny_patch16_224"}),
    ],
)
def test_a_mistake_with_timm_is_told_in_one_line(told, keys):
    with pytest.raises(ValueError, match=told) as caught:
        Timm(**DIGITS, **keys)
    assert "\n" not in str(caught.value)


# Replaced modules


def counted(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def test_gpt2_activations_and_norms_are_replaced(generator):
    config = {"model_type": "gpt2"}
    plain = HF(**TEXT, config=config, **SMALL).eval()
    model = HF(**TEXT, config=config, **SMALL, activation=Scaled, norm=nn.RMSNorm).eval()
    assert counted(model, Scaled) == 2
    assert counted(model, nn.RMSNorm) == 2 * 2 + 1
    assert counted(model, nn.LayerNorm) == 0
    assert all(len(m.factor) == 4 * 16 for m in model.modules() if isinstance(m, Scaled))
    model.load_state_dict(plain.state_dict(), strict=False)
    x = ids(generator)
    assert not torch.allclose(model(input_ids=x)["logits"], plain(input_ids=x)["logits"])
    model(input_ids=x)["logits"].sum().backward()
    assert all(m.factor.grad.any() for m in model.modules() if isinstance(m, Scaled))
    with pytest.raises(ValueError, match="replaced modules"):
        model.save_pretrained("nowhere")


def test_replacing_a_module_by_its_equal_changes_nothing(generator):
    """GELU by GELU, ReLU by ReLU, a fresh norm by a fresh norm of its kind."""
    resnet = Timm(**CIFAR, name="resnet18", keys={"zero_init_last": False}).eval()
    vit = Timm(**CIFAR, name="vit_tiny_patch16_224", **SMALL).eval()
    gpt2 = HF(**TEXT, config={"model_type": "gpt2"}, **SMALL).eval()
    x = {"pixel_values": images(CIFAR, generator)}
    cases = [
        (resnet, x, nn.ReLU, nn.BatchNorm2d),
        (resnet, x, Scaled, nn.BatchNorm2d),
        (vit, x, nn.GELU, lambda dim: nn.LayerNorm(dim, eps=1e-6)),
        (gpt2, {"input_ids": ids(generator)}, lambda: nn.GELU("tanh"), nn.LayerNorm),
    ]
    for model, inputs, activation, norm in cases:
        before = model(**inputs)["logits"]
        swap_activations(model, activation, lambda m=model, i=inputs: m(**i))
        swap_norms(model, norm)
        torch.testing.assert_close(model.eval()(**inputs)["logits"], before)


def test_resnet18_activations_know_their_channels(generator):
    model = Timm(**CIFAR, name="resnet18", activation=Scaled, norm=nn.LayerNorm)
    factors = [len(m.factor) for m in model.modules() if isinstance(m, Scaled)]
    assert factors == [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4
    assert counted(model, nn.BatchNorm2d) == 0
    assert counted(model, nn.LayerNorm) == 20  # 17 convolutions of 3×3 or 7×7, 3 of 1×1
    model(pixel_values=images(CIFAR, generator))["logits"].sum().backward()


def test_convnext_keeps_its_two_layouts_apart():
    """Its feed-forward layers act on the last dimension of images, its stem on the second."""
    model = Timm(**CIFAR, name="convnext_atto", activation=Scaled, norm=nn.LayerNorm)
    factors = {len(m.factor) for m in model.modules() if isinstance(m, Scaled)}
    assert factors == {160, 320, 640, 1280}  # four times the widths of its stages


def test_gates_stay(generator):
    model = Timm(**CIFAR, name="efficientnet_b0", activation=nn.ReLU)
    assert counted(model, nn.SiLU) == 0
    assert sum(type(m).__name__ == "Sigmoid" for m in model.modules()) == 16


def test_one_module_under_two_names_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.two = nn.ReLU()

    model = Twice()
    swap_activations(model, nn.Tanh, lambda: None)
    assert isinstance(model.one, nn.Tanh)
    assert model.one is model.two


@pytest.mark.parametrize(
    ("told", "swap"),
    [
        ("model.activation", lambda m: swap_activations(m, nn.ReLU, lambda: None)),
        ("model.norm", lambda m: swap_norms(m, nn.LayerNorm)),
    ],
)
def test_nothing_to_replace_is_an_error(told, swap):
    with pytest.raises(ValueError, match=f"{told}: Linear has no"):
        swap(nn.Linear(2, 2))


def test_channels_that_cannot_be_told_are_an_error():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU())
    with pytest.raises(ValueError, match="coefficients per channel"):
        swap_activations(model, Scaled, lambda: model(torch.zeros(1, 2, 5)))


def test_torchvision_imports_with_or_without_its_operators():
    code = "import models.torchvision_ops, torchvision.models, timm; print(torchvision.__version__)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
