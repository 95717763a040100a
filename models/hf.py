"""Any model of Hugging Face transformers."""

import inspect
import math
from pathlib import Path
from typing import Any

import models.torchvision_ops  # noqa: F401

# isort: split
import torch
import transformers
from torch import Tensor, nn

from models.layers import Factory
from models.outputs import Outputs
from models.swap import swap_activations, swap_norms
from models.vit import default_patch_size
from training.errors import nearest

transformers.utils.logging.disable_progress_bar()  # a run has its own

AUTO = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "image_classification": transformers.AutoModelForImageClassification,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
}
BATCH = ("input_ids", "attention_mask", "pixel_values")
SIZES = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"}
"""What transformers calls our sizes; a configuration may map that to a name of its own."""
DEFAULTS = {"width": 128, "depth": 4, "heads": 4}


class HF(nn.Module):
    """A model that transformers builds, from a configuration or with trained weights.

    Labels stay here: a task's are already aligned with the outputs, and a transformers model would
    shift them once more.

    Args:
        vocab_size, context_length, in_channels, image_size, num_classes: of the task, those it has.
        path: folder or name on the Hugging Face hub that says what the model is; in place of
            `config`.
        config: what the model is without a `path`: `model_type` and any key of its configuration.
        auto: what it does: "causal_lm", "masked_lm", "image_classification" or
            "sequence_classification".
        objective: what a language modelling task is to train it for: "masked" for masked_lm, else
            "causal".
        pretrained: load the weights at `path`, as 32-bit floats; else they are drawn anew.
        width, depth, heads: hidden size, layers, attention heads, where the configuration has them;
            its feed-forward width and key-value heads change in proportion. Default: 128, 4 and 4
            for a `config`, what it says for a `path`.
        activation, norm: replace the model's, see `models.swap`; default: its own.

    Returns `logits` of the model's own shape. For a causal language model whose logits are nothing
    but its classifier of its last hidden states: `hidden` and `classifier`.

    Raises:
        ValueError: for a model type, key, path, `auto` or `objective` that transformers does not
            have or that do not fit one another or the task.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        context_length: int | None = None,
        in_channels: int | None = None,
        image_size: int | None = None,
        num_classes: int | None = None,
        *,
        path: str | None = None,
        config: dict[str, Any] | None = None,
        auto: str = "causal_lm",
        objective: str = "causal",
        pretrained: bool = False,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        activation: Factory | None = None,
        norm: Factory | None = None,
    ) -> None:
        super().__init__()
        if auto not in AUTO:
            raise ValueError(f"model.auto: no '{auto}'{nearest(auto, AUTO)}")
        if (objective == "masked") != (auto == "masked_lm"):
            raise ValueError(
                f"model.objective: '{objective}' does not fit model.auto '{auto}'; "
                "'masked' goes with 'masked_lm'"
            )
        dims = {
            "vocab_size": vocab_size,
            "max_position_embeddings": context_length,
            "num_channels": in_channels,
            "image_size": image_size,
            "num_labels": num_classes,
        }
        dims = {key: value for key, value in dims.items() if value is not None}
        sizes = {"width": width, "depth": depth, "heads": heads}
        self.model: Any = (
            load(path, auto, dims, sizes) if pretrained else build(path, config, auto, dims, sizes)
        )
        self.replaced = activation is not None or norm is not None
        taken = inspect.signature(self.model.forward).parameters
        self.inputs = frozenset(name for name in BATCH if name in taken)
        self.options = {"use_cache": False} if "use_cache" in taken else {}
        self.fused = False
        self.example = _example("pixel_values" in self.inputs, dims, auto)
        self._try()
        if activation is not None:
            swap_activations(self.model, activation, self._try)
        if norm is not None:
            swap_norms(self.model, norm)
            self._try()
        self.fused = auto == "causal_lm" and self._logits_are_classified_hidden()

    def forward(self, **inputs: Tensor) -> Outputs:
        if self.fused:
            hidden = self.model.base_model(**inputs, **self.options).last_hidden_state
            return Outputs(hidden=hidden, classifier=self.model.get_output_embeddings())
        return Outputs(logits=self.model(**inputs, **self.options).logits)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that transformers' `from_pretrained` reads.

        Raises:
            ValueError: when modules were replaced, which such a folder cannot express.
        """
        if self.replaced:
            raise ValueError(
                "model.activation, model.norm: a model with replaced modules has no Hugging Face "
                "folder, since its configuration cannot name them"
            )
        self.model.save_pretrained(folder)

    def _try(self) -> Outputs:
        """One evaluation forward pass, so that what does not fit shows before training."""
        self.eval()
        try:
            with torch.no_grad():
                return self(**self.example)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shapes = ", ".join(f"{k} of shape {tuple(x.shape)}" for k, x in self.example.items())
            raise ValueError(
                f"model: {type(self.model).__name__} does not work on {shapes}: {_reason(error)}"
            ) from error
        finally:
            self.train()

    def _logits_are_classified_hidden(self) -> bool:
        """Whether the classifier gives the model's logits bit for bit: no scale, no soft cap."""
        classifier = self.model.get_output_embeddings()
        if classifier is None:
            return False
        logits = self._try()["logits"]
        self.eval()
        with torch.no_grad():
            outputs = self.model.base_model(**self.example, **self.options)
            hidden = getattr(outputs, "last_hidden_state", None)
            same = hidden is not None and torch.equal(classifier(hidden), logits)
        self.train()
        return same


def build(
    path: str | None,
    keys: dict[str, Any] | None,
    auto: str,
    dims: dict[str, int],
    sizes: dict[str, int | None],
) -> nn.Module:
    """A model with fresh weights, from the configuration at `path` or of `keys`."""
    keys = dict(keys or {})
    kind = keys.pop("model_type", None)
    if path is not None:
        if keys:
            raise ValueError(f"model.config.{next(iter(keys))}: model.path has its own; unset one")
        base = read_config(path)
        own = base.to_diff_dict()
        if "num_labels" in dims:
            own = {k: v for k, v in own.items() if k not in ("id2label", "label2id")}
        if sizes["depth"] is not None:  # what is listed layer by layer is worked out again
            layers = base.num_hidden_layers
            own = {k: v for k, v in own.items() if not (isinstance(v, list) and len(v) == layers)}
    else:
        base, own = default_config(kind), {}
        for key in keys:
            if not hasattr(base, key):
                raise ValueError(
                    f"model.config.{key}: no such key of '{kind}'{nearest(key, base.to_dict())}"
                )
        sizes = {
            size: DEFAULTS[size] if value is None and _has(base, SIZES[size]) else value
            for size, value in sizes.items()
        }
    _check_auto(base, auto)
    for change in (_resized(base, sizes), _dimensions(base, dims), keys):
        own |= {base.attribute_map.get(key, key): value for key, value in change.items()}
    own.setdefault("architectures", [])  # some types have several, and fail to choose from None
    try:
        return AUTO[auto].from_config(type(base)(**own))
    except Exception as error:  # each configuration and model checks itself in its own way
        raise ValueError(
            f"model.config: transformers could not build a {base.model_type}: {_reason(error)}"
        ) from error


def default_config(kind: str | None) -> Any:
    """The default configuration of a model type.

    Raises:
        ValueError: when transformers has no such type, naming the nearest.
    """
    if kind is None:
        raise ValueError("model.config: needs a model_type, or model.path in its place")
    if kind not in transformers.CONFIG_MAPPING:
        known = list(transformers.CONFIG_MAPPING.keys())
        raise ValueError(
            f"model.config.model_type: transformers has no '{kind}'{nearest(kind, known)}"
        )
    return transformers.AutoConfig.for_model(kind)


def load(
    path: str | None, auto: str, dims: dict[str, int], sizes: dict[str, int | None]
) -> nn.Module:
    """A model with the weights at `path`; its classes are those of the task."""
    if path is None:
        raise ValueError("model.path: model.pretrained needs one, a folder or a name on the hub")
    for name, value in sizes.items():
        if value is not None:
            raise ValueError(f"model.{name}: fixed by the weights with model.pretrained=true")
    config = read_config(path)
    _check_auto(config, auto)
    for name in ("num_channels", "image_size"):
        own = getattr(config, name, None)
        if own is not None and name in dims and own not in (dims[name], [dims[name]] * 2):
            raise ValueError(f"model.path: its {name} is {own}, the task's {dims[name]}")
    for name in ("vocab_size", "max_position_embeddings"):
        own = getattr(config, name, None)
        if own is not None and dims.get(name, 0) > own:
            raise ValueError(f"model.path: its {name} is {own}, the task needs {dims[name]}")
    if "num_labels" in dims:
        config.num_labels = dims["num_labels"]
    try:
        return AUTO[auto].from_pretrained(
            path, config=config, dtype=torch.float32, ignore_mismatched_sizes="num_labels" in dims
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model.path: cannot load '{path}': {_reason(error)}") from error


def read_config(path: str) -> Any:
    """The configuration in a local folder or on the hub.

    Raises:
        ValueError: when there is none, naming the nearest folder.
    """
    local = Path(path).expanduser()
    if not local.is_dir() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        siblings = [str(p) for p in local.parent.glob("*") if p.is_dir()]
        raise ValueError(f"model.path: no folder '{path}'{nearest(str(local), siblings)}")
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: cannot read '{path}': {_reason(error)}") from error


def _check_auto(config: Any, auto: str) -> None:
    fitting = [name for name, made in AUTO.items() if type(config) in made._model_mapping]
    if auto not in fitting:
        raise ValueError(
            f"model.auto: transformers has no {auto} of type '{config.model_type}'; it has: "
            f"{', '.join(fitting) or 'none that assay trains'}"
        )


def _has(config: Any, key: str) -> bool:
    """Whether a configuration has a number for this key, under that or its own name for it."""
    by_stage = isinstance(getattr(config, "depths", None), list)  # such as Swin: totals are no keys
    own = config.attribute_map.get(key, key)
    return isinstance(config.to_dict().get(own), int) and not (by_stage and key in SIZES.values())


def _resized(config: Any, sizes: dict[str, int | None]) -> dict[str, int]:
    """Changes to a configuration that give it these sizes."""
    changes = {}
    for size, name in SIZES.items():
        if sizes[size] is None:
            continue
        if not _has(config, name):
            raise ValueError(f"model.{size}: '{config.model_type}' has no {name} to set")
        changes[name] = sizes[size]
    width, heads = sizes["width"], sizes["heads"]
    for name in ("intermediate_size", "ffn_dim"):
        if width is not None and _has(config, name):
            changes[name] = math.ceil(getattr(config, name) * width / config.hidden_size)
    if heads is not None and _has(config, "num_key_value_heads"):
        shared = config.num_attention_heads // config.num_key_value_heads
        changes["num_key_value_heads"] = max(1, heads // shared)
    if (width or heads) and _has(config, "head_dim"):
        changes["head_dim"] = (width or config.hidden_size) // (heads or config.num_attention_heads)
    return changes


def _dimensions(config: Any, dims: dict[str, int]) -> dict[str, Any]:
    """Changes to a configuration that fit it to the task."""
    changes: dict[str, Any] = {
        k: v for k, v in dims.items() if k == "num_labels" or _has(config, k)
    }
    if "image_size" in changes and _has(config, "patch_size"):
        changes["patch_size"] = default_patch_size(dims["image_size"])
    if "roberta" in config.model_type and "max_position_embeddings" in changes:
        # Its positions count from after the padding token's id.
        changes["max_position_embeddings"] += config.pad_token_id + 1
    if "vocab_size" in changes:
        # Special tokens beyond the task's vocabulary would be refused, or index out of range.
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(config, token, None)
            if isinstance(value, int) and value >= dims["vocab_size"]:
                changes[token] = None
    return changes


def _example(images: bool, dims: dict[str, int], auto: str) -> dict[str, Tensor]:
    """The smallest batch of the task's shape."""
    if images and {"num_channels", "image_size"} <= dims.keys():
        size = dims["image_size"]
        return {"pixel_values": torch.zeros(1, dims["num_channels"], size, size)}
    if not images and {"vocab_size", "max_position_embeddings"} <= dims.keys():
        length = dims["max_position_embeddings"]
        return {"input_ids": torch.arange(length)[None] % dims["vocab_size"]}
    raise ValueError(f"model.auto: {auto} needs {'images' if images else 'text'} from the task")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
