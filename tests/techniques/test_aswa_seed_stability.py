from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from techniques.callback.aswa_seed_stability import ASWA
from tests.conformance.runs import tiny
from training.assemble import assemble
from training.progress import Progress
from training.tracking import NoTracker
from training.trainer import fit

SHAPES = ((3, 2), (3,))
EPOCHS, STEPS = 4, 7


def targets() -> list[list[np.ndarray]]:
    """What each step pulls the parameters towards: noise around −1, ever less."""
    rng = np.random.default_rng(0)
    return [
        [rng.normal(size=shape) / (1 + t / 5) - 1 for shape in SHAPES]
        for t in range(EPOCHS * STEPS)
    ]


def pulled(weight, target):
    return weight - 0.3 * (weight - target)


def theirs(choice: int) -> tuple[list[list[np.ndarray]], int]:
    """The authors' loop with their settings [1, 1, 1, choice], in NumPy: the weights after each
    epoch, and the number of updates."""
    weights = [np.zeros(shape) for shape in SHAPES]
    buffers, updates, taken, norms, ends = None, 0, 0, [], []
    pulls = iter(targets())

    def update():
        nonlocal buffers, updates
        buffers = buffers or [np.zeros(shape) for shape in SHAPES]
        buffers = [b + (w - b) / (updates + 1) for b, w in zip(buffers, weights)]
        updates += 1

    for _ in range(EPOCHS):
        for _ in range(STEPS):
            if taken > 1:
                if buffers is None:
                    update()
                sizes = [np.linalg.norm(b - w) for b, w in zip(buffers, weights)]
                size = np.max(sizes) if choice == 2 else np.mean(sizes)
                if choice == 0:
                    update()
                elif size > (np.mean(norms) if norms else 0):
                    update()
                    norms = [size]
                elif size > 0:
                    norms.append(size)
            weights = [pulled(w, t) for w, t in zip(weights, next(pulls))]
            taken += 1
        weights, buffers, norms = buffers, weights, []
        ends.append(weights)
    return ends, updates


def ours(callback: ASWA) -> list[list[np.ndarray]]:
    """The same steps under the callback, an epoch being 7 steps of 4 samples."""
    objective = nn.ParameterList(nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in SHAPES)
    run = SimpleNamespace(
        objective=objective,
        step=0,
        max_steps=EPOCHS * STEPS,
        config={"trainer": {"batch_size": 4}},
        batches=SimpleNamespace(sampler=SimpleNamespace(length=4 * STEPS)),
    )
    callback.on_fit_start(run)
    ends = []
    for target in targets():
        with torch.no_grad():
            for parameter, pull in zip(objective, target):
                parameter.copy_(pulled(parameter, torch.from_numpy(pull)))
        run.step += 1
        callback.on_step_end(run)
        if run.step % STEPS == 0:
            ends.append([p.detach().numpy().copy() for p in objective])
    return ends


@pytest.mark.parametrize(("chosen", "choice"), [(None, 0), ("mean", 1), ("max", 2)])
def test_is_the_authors_loop(chosen, choice):
    expected, updates = theirs(choice)
    callback = ASWA(filter=chosen)
    for found, want in zip(ours(callback), expected, strict=True):
        for a, b in zip(found, want):
            np.testing.assert_allclose(a, b, rtol=1e-10)
    assert callback.average.averaged == updates


def test_the_filter_leaves_steps_out():
    counts = [theirs(choice)[1] for choice in (0, 1, 2)]
    assert counts[0] == EPOCHS * STEPS - 2 + 1
    assert counts[1] < counts[0] > counts[2]


def test_first_epoch_ends_in_the_mean_of_the_weights():
    """Of steps 2 (twice) to 6: by hand."""
    weights, seen = [np.zeros(s) for s in SHAPES], []
    for target in targets()[:STEPS]:
        weights = [pulled(w, t) for w, t in zip(weights, target)]
        seen.append(weights)
    kept = [seen[1], *seen[1:-1]]
    for number, found in enumerate(ours(ASWA())[0]):
        np.testing.assert_allclose(found, np.mean([w[number] for w in kept], 0), rtol=1e-12)


def test_an_epoch_is_one_pass_over_the_samples(tmp_path):
    """455 rows in batches of 160: steps 3, 6 and 9 take the last samples of an epoch (480, 960,
    1440), and the last step, 10, ends one too."""
    few = ("trainer.max_steps=10", "trainer.batch_size=160", "trainer.log_every=1")
    run = assemble(tiny("aswa_seed_stability", tmp_path, *few)[0])
    run.open(tmp_path)
    before: dict[str, torch.Tensor] = {}
    exchanged = []

    class First:
        def on_step_end(self, run):
            before.update({n: p.detach().clone() for n, p in run.model.named_parameters()})

    class Last:
        def on_step_end(self, run):
            if any(not p.equal(before[n]) for n, p in run.model.named_parameters()):
                exchanged.append(run.step)

    run.callbacks = {"first": First(), **run.callbacks, "last": Last()}
    assert fit(run, NoTracker(), Progress()) == "completed"
    assert exchanged == [3, 6, 9, 10]


def test_settings_reach_the_class(tmp_path):
    key = "callbacks.aswa_seed_stability"
    config = tiny("aswa_seed_stability", tmp_path, f"{key}.filter=max", f"+{key}.start=5")[0]
    callback = assemble(config).callbacks["aswa_seed_stability"]
    assert (callback.filter, callback.start) == ("max", 5)


def test_refusals():
    with pytest.raises(ValueError, match="filter: null, mean or max, got 'median'"):
        ASWA(filter="median")
    with pytest.raises(ValueError, match="start: must be at least 0"):
        ASWA(start=-1)
    with pytest.raises(ValueError, match="every: must be at least 1"):
        ASWA(every=0)
