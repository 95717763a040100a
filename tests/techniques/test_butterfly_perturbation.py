import numpy as np
import pytest
import torch

from techniques.callback.butterfly_perturbation import ButterflyPerturbation, noise
from tests.conformance.runs import fitted

SHAPES = {"a": (torch.Size([40, 30]), 0.5), "b": (torch.Size([20, 40]), 0.1)}
"""Of weights, and their standard deviations."""
EXPECTED = np.sqrt(40 * 30 * 0.5**2 + 20 * 40 * 0.1**2)


def norm(tensors):
    return np.sqrt(sum(np.square(t.numpy()).sum() for t in tensors))


def test_norm_is_a_fraction_of_that_of_the_initial_weights():
    found = noise(SHAPES, 0.01, 1.0, 0)
    assert norm(found.values()) == pytest.approx(0.01 * EXPECTED, rel=1e-12)
    # Each weight by its own scale: sums of squares are χ², here within five deviations.
    for name, (shape, deviation) in SHAPES.items():
        share = np.square(found[name].numpy()).mean() / (0.01 * deviation) ** 2
        assert share == pytest.approx(1, abs=5 * np.sqrt(2 / shape.numel()) + 0.1)


def test_a_fraction_moves_so_many_elements_alone():
    everything, few = (noise(SHAPES, 0.01, fraction, 0) for fraction in (1.0, 0.1))
    moved = sum(int((t != 0).sum()) for t in few.values())
    assert moved == round(0.1 * (40 * 30 + 20 * 40))
    for name, tensor in few.items():
        where = tensor != 0
        assert tensor[where].equal(everything[name][where])
    one = noise(SHAPES, 0.01, 1 / 2000, 0)
    assert sum(int((t != 0).sum()) for t in one.values()) == 1


def weights(run):
    return torch.cat([p.detach().flatten().double() for p in run.model.parameters()])


def test_twins_are_equal_to_the_bit_until_the_step(tmp_path):
    def train(name, steps, *given):
        point = [f"callbacks.butterfly_perturbation.{g}" for g in given]
        steps = f"trainer.max_steps={steps}"
        return fitted("butterfly_perturbation", tmp_path / name, steps, *point)[0]

    still = weights(train("still", 4, "scale=0"))
    assert weights(train("never", 4, "step=9", "scale=1")).equal(still)
    late, early = (train(f"at{k}", 4, f"step={k}", "scale=0.01") for k in (3, 0))
    assert not weights(late).equal(still)
    assert not weights(early).equal(still)
    before = train("before", 3, "step=3", "scale=0.01")
    assert weights(before).equal(weights(train("still3", 3, "scale=0")))
    # Before the first step the deviations are those of the fresh model.
    lengths = {n: float(v) for n, v in early.callbacks["butterfly_perturbation"].deviations.items()}
    assert lengths == late.callbacks["butterfly_perturbation"].deviations
    matrices = {n: p for n, p in early.model.named_parameters() if p.ndim > 1}
    assert lengths.keys() == matrices.keys()
    expected = 0.01 * np.sqrt(sum(p.numel() * lengths[n] ** 2 for n, p in matrices.items()))
    lines = (tmp_path / "at0" / "metrics.jsonl").read_text()
    assert early.last["perturbation"] == pytest.approx(expected, rel=1e-9)
    assert lines.count('"perturbation"') == 1


def test_refusals():
    for given in ({"step": -1}, {"scale": -1}, {"fraction": 0}, {"fraction": 1.1}):
        with pytest.raises(ValueError, match=f"^{next(iter(given))}"):
            ButterflyPerturbation(**{"step": 0, "scale": 0.1, **given})
