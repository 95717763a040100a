import pytest
import torch

from study.probes.calibration import Calibration, calibration_error, risk_coverage
from tests.study.test_probes import DIGITS, lines


def draw(count=500):
    generator = torch.Generator().manual_seed(0)
    confidence = 0.1 + 0.9 * torch.rand(count, generator=generator, dtype=torch.float64)
    correct = (torch.rand(count, generator=generator) < 0.7).double()
    return confidence, correct


def test_calibration_error_by_bins():
    confidence, correct = draw()
    total = 0.0
    for number in range(10):
        low, high = number / 10, (number + 1) / 10
        inside = [(c, r) for c, r in zip(confidence.tolist(), correct.tolist()) if low < c <= high]
        if inside:
            accuracy = sum(r for _, r in inside) / len(inside)
            mean = sum(c for c, _ in inside) / len(inside)
            total += abs(accuracy - mean) * len(inside) / len(confidence)
    assert calibration_error(confidence, correct) == pytest.approx(total, abs=1e-12)


def test_of_certain_predictions_it_is_their_error():
    correct = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    assert calibration_error(torch.ones(4, dtype=torch.float64), correct) == pytest.approx(0.25)


def test_risk_coverage_by_counting():
    confidence, correct = draw()
    pairs = sorted(zip(confidence.tolist(), correct.tolist()), reverse=True)
    risks = [sum(1 - r for _, r in pairs[:k]) / k for k in range(1, len(pairs) + 1)]
    assert risk_coverage(confidence, correct) == pytest.approx(sum(risks) / len(risks), abs=1e-12)


def test_errors_with_the_least_confidence_cost_least():
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    last = risk_coverage(confidence, torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    first = risk_coverage(confidence, torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    assert (last, first) == (pytest.approx(1 / 16), pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4))


def test_is_recorded_at_the_end(tmp_path):
    probe = "+callbacks.c={_target_:study.probes.calibration.Calibration}"
    found = lines(tmp_path, *DIGITS, "trainer.max_steps=2", "trainer.eval_every=1", probe)
    assert "probe/ece" not in found[0]
    assert 0 <= found[-1]["probe/ece"] <= 1
    assert 0 <= found[-1]["probe/aurc"] <= 1
    with pytest.raises(ValueError, match="bins"):
        Calibration(0)
