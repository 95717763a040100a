import numpy as np
import pytest
import torch

from techniques.post.layers import linear_layers
from techniques.post.prune import Prune
from tests.techniques.compressed import lines, run_of
from training.packing import load


def weights(run):
    layers = linear_layers(run.model)
    return {name: layer.weight.detach().numpy().copy() for name, layer in layers.items()}


def pruned(amount, **keys):
    run = run_of()
    before = weights(run)
    Prune(amount, **keys)(run)
    return before, weights(run), run


def test_global_magnitude_is_one_threshold_for_all_layers():
    before, after, _ = pruned(0.7)
    every = np.sort(np.abs(np.concatenate([w.ravel() for w in before.values()])))
    threshold = every[round(0.7 * len(every)) - 1]
    for name, weight in before.items():
        np.testing.assert_array_equal(after[name], np.where(abs(weight) > threshold, weight, 0))
    parts = [np.mean(weight == 0) for weight in after.values()]
    assert max(parts) - min(parts) > 0.1


def test_layer_magnitude_is_a_threshold_for_each():
    before, after, _ = pruned(0.7, scope="layer")
    for name, weight in before.items():
        threshold = np.sort(np.abs(weight).ravel())[round(0.7 * weight.size) - 1]
        np.testing.assert_array_equal(after[name], np.where(abs(weight) > threshold, weight, 0))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_random_is_of_any_magnitude_and_a_function_of_the_seed(scope):
    before, after, _ = pruned(0.5, scope=scope, by="random")
    torch.rand(7)
    _, again, _ = pruned(0.5, scope=scope, by="random")
    old, new = (np.concatenate([w.ravel() for w in x.values()]) for x in (before, after))
    assert np.mean(new == 0) == pytest.approx(0.5, abs=1e-3)
    kept = abs(old[new != 0]).mean(), abs(old[new == 0]).mean()
    assert kept[0] == pytest.approx(kept[1], rel=0.1)
    for name, weight in after.items():
        np.testing.assert_array_equal(again[name], weight)


@pytest.mark.parametrize("by", ["magnitude", "random"])
def test_again_prunes_the_part_of_what_is_left(by):
    _, first, run = pruned(0.5, by=by)
    Prune(0.5, by=by)(run)
    second = weights(run)
    old, new = (np.concatenate([w.ravel() for w in x.values()]) for x in (first, second))
    assert np.mean(new == 0) == pytest.approx(0.75, abs=1e-3)
    assert not new[old == 0].any()


def test_nothing_and_everything():
    before, after, _ = pruned(0)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert not any(weight.any() for weight in pruned(1)[1].values())


def test_leaves_the_models_random_numbers_and_no_hook():
    run = run_of()
    state = torch.get_rng_state()
    Prune(0.5, by="random")(run)
    assert torch.get_rng_state().equal(state)
    assert not any(m._forward_pre_hooks for m in run.model.modules())
    assert not any("mask" in name or "orig" in name for name in run.model.state_dict())


def test_settings_reach_the_class_and_zeros_take_fewer_bytes(tmp_path):
    folder, metrics = lines(
        tmp_path,
        "+post.some={_target_:techniques.post.prune.Prune,amount:0.8,scope:layer,exclude:head}",
        "+post.more={_target_:techniques.post.prune.Prune,amount:0.8}",
    )
    assert metrics["post/more/bytes"] < 0.6 * metrics["post/some/bytes"]
    assert metrics["post/some/bytes"] < 0.6 * metrics["post/bytes"]
    state = load(folder / "post" / "some.packed.safetensors")
    assert state["head.weight"].all()
    assert (state["layers.0.weight"] == 0).float().mean() == pytest.approx(0.8, abs=1e-3)


def test_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="amount: must be between 0 and 1"):
        Prune(1.5)
    with pytest.raises(ValueError, match="scope: one of global, layer"):
        Prune(0.5, scope="row")
    with pytest.raises(ValueError, match="by: one of magnitude, random"):
        Prune(0.5, by="size")
