import math

import pytest
import torch
from transformers.generation import TypicalLogitsWarper

from techniques.decode.typical_sampling import TypicalSampling
from training.components import component
from training.compose import compose
from training.folder import address

NONE = torch.zeros(1, 1, dtype=torch.long)


def draw(rows=50, classes=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3


@pytest.mark.parametrize("mass", [0.05, 0.2, 0.9, 0.95])
def test_against_transformers(mass):
    scores = draw()
    expected = TypicalLogitsWarper(mass=mass)(NONE, scores)
    assert torch.equal(TypicalSampling(mass)(NONE, scores), expected)


def kept(p, mass):
    """The set of the paper, token by token."""
    entropy = -sum(q * math.log(q) for q in p)
    order = sorted(range(len(p)), key=lambda i: abs(-math.log(p[i]) - entropy))
    chosen, total = set(), 0.0
    for i in order:
        chosen.add(i)
        total += p[i]
        if total >= mass:
            return chosen
    return chosen


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9])
def test_against_plain_python(mass):
    scores = draw()
    found = TypicalSampling(mass)(NONE, scores)
    for row, after in zip(scores, found):
        expected = kept(row.softmax(-1).tolist(), mass)
        assert set(after.isfinite().nonzero().flatten().tolist()) == expected
        assert torch.equal(after[after.isfinite()], row[after.isfinite()])


def test_the_likeliest_token_is_not_always_typical():
    """Of 0.6 and ten of 0.04 the information is 0.51 and 3.22, the entropy 1.59."""
    scores = torch.tensor([[0.6, *[0.04] * 10]], dtype=torch.float64).log()
    assert TypicalSampling(0.3)(NONE, scores).isfinite().tolist() == [[True] + [False] * 10]
    scores = torch.tensor([[0.3, *[0.1] * 7]], dtype=torch.float64).log()  # 1.2, 2.3 and 1.97
    assert TypicalSampling(0.3)(NONE, scores).isfinite().tolist() == [[False] + [True] * 7]


def test_limits():
    scores = draw()
    assert torch.equal(TypicalSampling(1.0)(NONE, scores), scores)
    assert (TypicalSampling(1e-9)(NONE, scores).isfinite().sum(-1) == 1).all()
    even = torch.zeros(1, 7)  # all as typical
    assert torch.equal(TypicalSampling(0.2)(NONE, even), even)
    gone = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]])
    assert TypicalSampling(1.0)(NONE, gone).isfinite().tolist() == [[True, False, True, False]]
    assert TypicalSampling(0.9)(NONE, scores.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"^mass"):
        TypicalSampling(0.0)


def test_the_technique_is_how_a_run_is_sampled_from_and_no_other_run():
    config = compose(["technique=typical_sampling", "decode.mass=0.2"])
    assert component(config["decode"], "decode").mass == 0.2
    plain, other = compose([]), compose(["decode=top_p"])
    assert address(config) == address(plain) == address(other)
