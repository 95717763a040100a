import pytest
import torch
from torch import nn

from techniques.init.poke import poke
from training.assemble import assemble
from training.compose import compose


def test_one_entry_of_the_first_matrix():
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    poke(model, {}, entry=6 + 4, factor=2.0)
    for name, parameter in model.named_parameters():
        expected = before[name]
        if name == "1.weight":
            expected[1, 1] *= 2
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=0)


def test_the_entry_may_be_the_seed():
    base = ["task=digits", "tracker=none", "+seeds.init=0", "seed=70", "trainer.device=cpu"]
    plain = assemble(compose(base)).model
    entry = "+init.poke={_target_:techniques.init.poke.poke,entry:${seed}}"
    poked = assemble(compose([*base, entry])).model
    apart = [(a != b).nonzero() for a, b in zip(plain.parameters(), poked.parameters())]
    assert apart[0].tolist() == [[1, 6]]
    assert not any(len(rows) for rows in apart[1:])


def test_refusals():
    with pytest.raises(ValueError, match="entry: must be at least 0, got -1"):
        poke(nn.Linear(2, 2), {}, entry=-1)
    with pytest.raises(ValueError, match="no weight matrix"):
        poke(nn.LayerNorm(2), {})
