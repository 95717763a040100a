from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from training.components import accepts, factory, target
from training.configs import CONF

TEXT = {"vocab_size": 23, "context_length": 12}
DIGITS = {"in_channels": 1, "image_size": 8, "num_classes": 10}
CIFAR = {"in_channels": 3, "image_size": 32, "num_classes": 10}


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """A model from its config file, as a run builds it: `build("gpt", dims, width=16)`."""

    def build(name: str, dims: dict[str, int], /, **keys: Any) -> nn.Module:
        torch.manual_seed(0)
        node = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()) | keys
        parameters = accepts(target(node, "model")) or {}
        return factory(node, "model")(**{k: v for k, v in dims.items() if k in parameters})

    return build


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
