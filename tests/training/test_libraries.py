import pytest
import torch

from cli.complete import overrides
from tests.cli.invoke import invoke
from training.components import call, factory
from training.compose import compose
from training.errors import UsageError
from training.libraries import library


def test_names_are_those_of_the_libraries():
    found = library()
    assert found["nadam"] == "torch.optim.NAdam"
    assert found["lion"] == "pytorch_optimizer.optimizer.Lion"
    assert not {"adamw", "optimizer", "adamp"} & set(found)  # of conf/, and no optimizer


def test_keys_are_the_arguments_with_their_defaults():
    node = compose(["task=digits", "optimizer=lion", "optimizer.lr=3e-4"])["optimizer"]
    assert node["_target_"] == "pytorch_optimizer.optimizer.Lion"
    assert (node["lr"], node["betas"], node["weight_decay"]) == (3e-4, [0.9, 0.99], 0.0)
    with pytest.raises(UsageError, match=r"optimizer\.betta.*'optimizer\.betas'"):
        compose(["task=digits", "optimizer=lion", "optimizer.betta=1"])
    with pytest.raises(UsageError, match="optimizer: no 'lionn'; did you mean 'lion'"):
        compose(["task=digits", "optimizer=lionn"])


def test_completion_and_listing_know_them():
    assert overrides("optimizer=lio") == ["optimizer=lion", "optimizer=lion_k"]
    assert "pytorch_optimizer.optimizer.Lion" in invoke("list", "optimizers").out


@pytest.mark.parametrize("name", library())
def test_every_one_steps_as_it_is(name):
    """Composed, built over two groups and stepped; it moves both, but for one that needs more."""
    node = compose(["task=digits", f"optimizer={name}"])["optimizer"]
    torch.manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(size)) for size in ((4, 3), (4,)))
    start = weight.detach().clone()
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}]
    if name == "ranger21":
        with pytest.raises(UsageError, match="num_iterations"):
            call(factory(node, "optimizer"), "optimizer", groups)
        return
    optimizer = call(factory(node, "optimizer"), "optimizer", groups)
    for _ in range(40):  # some begin late
        optimizer.zero_grad()
        (weight.square().sum() + bias.square().sum()).backward()
        optimizer.step()
    assert torch.isfinite(weight).all()
    assert not weight.equal(start)
