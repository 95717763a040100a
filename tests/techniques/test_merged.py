import pytest
import torch

from techniques.post.merged import Merged
from tests.techniques.compressed import lines, run_of
from training.errors import UsageError
from training.packing import load

QAT = (
    "+reparam.qat={_target_:techniques.reparam.qt_dog.qt_dog,bits:3,targets:'.'}",
    "+callbacks.qat={_target_:techniques.callback.qt_dog.Quantise,start:0.0}",
)


def test_what_training_quantised_is_codes(tmp_path):
    folder, metrics = lines(tmp_path, *QAT, "+post.merged={_target_:techniques.post.merged.Merged}")
    assert metrics["post/merged/val/loss"] == pytest.approx(metrics["val/loss"], rel=1e-5)
    state = load(folder / "post" / "merged.packed.safetensors")
    assert not any("parametrizations" in name for name in state)
    assert all(len(row.unique()) <= 8 for row in state["layers.0.weight"])
    assert metrics["post/merged/bytes"] < 0.3 * metrics["post/bytes"]


def test_values_are_the_parametrized_ones():
    run = run_of(*QAT)
    for module in run.model.modules():
        for chain in getattr(module, "parametrizations", {}).values():
            chain[0].begin(chain.original)
    expected = run.model.get_submodule("head").weight.detach().clone()  # type: ignore[operator]
    Merged()(run)
    torch.testing.assert_close(
        run.model.get_parameter("head.weight").detach(), expected, rtol=1e-6, atol=0
    )
    assert "head.weight" in run.grids


def test_before_quantisation_has_begun_weights_are_plain():
    run = run_of(*QAT)
    expected = run.model.get_submodule("head").weight.detach().clone()  # type: ignore[operator]
    Merged()(run)
    assert run.model.get_parameter("head.weight").equal(expected)
    assert not run.grids


def test_a_plain_model_has_nothing_to_merge():
    with pytest.raises(UsageError, match="no parametrized tensor"):
        Merged()(run_of())
