import numpy as np
import pytest
import torch
from scipy.stats import entropy

from techniques.post.atc_accuracy_prediction import (
    ATC,
    importance,
    negative_entropy,
    predictions,
    thresholded,
)
from techniques.post.held_out import halves, said
from training.assemble import assemble
from training.components import factory
from training.compose import compose

RNG = np.random.default_rng(0)
NAMES = ["task=digits", "model.width=16", "tracker=none", "trainer.device=cpu"]


def searched(scores, correct):
    """The threshold of the authors' helper, by trying every score: that with the least difference
    between wrong samples above it and right ones not above it."""
    differences = [
        abs((1 - correct)[scores > t].sum() - correct[scores <= t].sum()) for t in scores
    ]
    return scores[int(np.argmin(differences))]


def test_threshold_balances_the_two_sorts_of_mistakes():
    for share in (0.1, 0.5, 0.9):
        scores, target = RNG.random(80), RNG.random(50)
        correct = (RNG.random(80) < share).astype(float)
        expected = (target >= searched(scores, correct)).mean()
        assert thresholded(scores, target, correct) == expected


def test_on_its_source_it_is_the_accuracy_and_a_sample():
    scores = RNG.random(60)
    correct = (RNG.random(60) < 0.8).astype(float)
    assert thresholded(scores, scores, correct) == pytest.approx(correct.mean() + 1 / 60)
    assert thresholded(scores, scores, np.ones(60)) == 1


def test_of_a_shift_in_the_scores_it_is_exact():
    """Where a sample is right if and only if its score is over a fixed one, the accuracy of any
    other set is predicted to a source sample's width."""
    source, target = RNG.random(5000), RNG.random(5000) ** 2
    found = thresholded(source, target, (source > 0.3).astype(float))
    assert found == pytest.approx((target > 0.3).mean(), abs=1e-3)


def test_the_other_ways():
    source, target = RNG.dirichlet(np.ones(4), 90), RNG.dirichlet(np.ones(4) / 3, 70)
    correct = (RNG.random(90) < 0.6).astype(float)
    found = predictions(source, correct, target)
    ours, theirs = source.max(1), target.max(1)
    assert found["ac"] == pytest.approx(theirs.mean(), abs=1e-12)
    assert found["doc"] == pytest.approx(correct.mean() + theirs.mean() - ours.mean(), abs=1e-12)
    np.testing.assert_allclose(negative_entropy(source), -entropy(source, axis=1), atol=1e-12)
    above = (theirs >= searched(ours, correct)).mean()
    assert found["atc_mc"] == pytest.approx(above, abs=1e-12)
    total = weight = 0.0
    for low in np.arange(10) / 10:
        inside, others = ((c >= low) & (c < low + 0.1) for c in (ours, theirs))
        if inside.any():
            factor = others.mean() / inside.mean()
            total += factor * correct[inside].sum()
            weight += factor * inside.sum()
    assert found["im"] == pytest.approx(total / weight, abs=1e-12)
    np.testing.assert_allclose(importance(ours, ours), 1)


def test_records_every_shift_and_the_mean_error():
    run = assemble(compose([*NAMES, "technique=atc_accuracy_prediction"]))
    step = run.post["atc_accuracy_prediction"]
    step.shifts = dict(list(step.shifts.items())[3:5])
    step(run)
    found = {k.removeprefix("post/atc_accuracy_prediction/"): v for k, v in run.recorded.items()}
    _, rest = halves(run, 0.5, 0)
    for name, sigma in (("blur1", 0.5), ("blur2", 1.0)):
        blurred = factory({"_target_": "tasks.corruptions.blur", "sigma": sigma}, "")(rest)
        logits, labels = said(run, blurred)
        right = (logits.argmax(1) == labels).double().mean().item()
        assert found[f"{name}/accuracy"] == right
    for way in ("atc_mc", "atc_ne", "ac", "doc", "im"):
        gaps = [abs(found[f"{s}/{way}"] - found[f"{s}/accuracy"]) for s in ("blur1", "blur2")]
        assert found[f"error/{way}"] == pytest.approx(np.mean(gaps))
    assert len(found) == 2 * 6 + 5


def test_the_source_has_its_temperature():
    """Confidences do not depend on the scale of the logits."""
    run = assemble(compose([*NAMES, "technique=atc_accuracy_prediction"]))
    step = run.post["atc_accuracy_prediction"]
    step.shifts = {"noise1": step.shifts["noise1"]}
    step(run)
    first = run.recorded
    with torch.no_grad():
        for parameter in run.model.head.parameters():
            parameter.mul_(8)
    step(run)
    assert run.recorded == pytest.approx(first, abs=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match=r"^shifts: expected at least one"):
        ATC({})
    with pytest.raises(ValueError, match=r"^share"):
        ATC({"a": {"_target_": "tasks.corruptions.turn", "degrees": 3}}, share=0)
