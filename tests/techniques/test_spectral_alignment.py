import pytest
import torch

from techniques.callback.spectral_alignment import (
    SpectralAlignment,
    first_singular_vector,
    sign_diversity,
)
from tests.conformance.runs import fitted


def test_vector_is_the_singular_one():
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    found = first_singular_vector(weight, None, 500)
    expected = torch.linalg.svd(weight).Vh[0]
    assert (found @ expected).abs().item() == pytest.approx(1, abs=1e-5)


def test_sign_diversity():
    x = torch.tensor([[1.0, 9.0], [2.0, -9.0], [3.0, 0.0], [-1.0, 0.0]])
    assert sign_diversity(x, torch.tensor([1.0, 0.0])) == 0.25
    assert sign_diversity(x.abs(), torch.tensor([1.0, 0.0])) == 0.0


def test_records_every_layer_and_changes_nothing(tmp_path):
    every = "callbacks.spectral_alignment.every=2"
    watched, _ = fitted("spectral_alignment", tmp_path / "a", "trainer.max_steps=4", every)
    never = "callbacks.spectral_alignment.every=100"
    plain, _ = fitted("spectral_alignment", tmp_path / "b", "trainer.max_steps=4", never)
    found = {k: v for k, v in watched.last.items() if k.startswith("probe/sign_diversity/")}
    assert len(found) == 2 * 4 + 1
    assert all(0 <= value <= 0.5 for value in found.values())
    assert watched.last["probe/sign_diversity"] == min(found.values())
    for ours, theirs in zip(watched.model.parameters(), plain.model.parameters()):
        assert ours.equal(theirs)


def test_refusals():
    with pytest.raises(ValueError, match="every"):
        SpectralAlignment(every=0)
