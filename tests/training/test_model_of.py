from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tasks.cache import model_digest
from training.errors import UsageError
from training.trained import model_of


def linear(in_features, bias=True):
    return nn.Linear(in_features, 3, bias)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def test_a_component_is_told_the_tasks_dims_and_leaves_the_random_state_alone(accelerator):
    before = torch.get_rng_state()
    model, about = model_of(linear, accelerator, "key.of", dims={"in_features": 5, "other": 1})
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(0)
    assert model_digest(model) == model_digest(nn.Linear(5, 3))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    again = model_of(partial(linear, bias=True), accelerator, "key.of", dims={"in_features": 5})
    assert about != again[1]
    assert model_digest(again[0]) == model_digest(model)


def test_what_is_no_source_is_told_by_its_key(accelerator, tmp_path):
    with pytest.raises(UsageError, match=r"key\.of: which model\?"):
        model_of(None, accelerator, "key.of")
    with pytest.raises(UsageError, match=r"key\.of: .* is no run folder"):
        model_of(tmp_path, accelerator, "key.of")
    with pytest.raises(UsageError, match=r"key\.of: .*in_features"):
        model_of(linear, accelerator, "key.of")
