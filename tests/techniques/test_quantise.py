import numpy as np
import pytest
import torch

from techniques.post.quantise import Quantise
from tests.techniques.compressed import lines, run_of
from training.packing import Affine, load


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_rounded_to_their_own_grid(bits, symmetric):
    run = run_of()
    run.model.double()
    before = run.model.get_parameter("head.weight").detach().numpy().copy()
    Quantise(bits, symmetric=symmetric)(run)
    found = run.model.get_parameter("head.weight").detach().numpy()
    top = 2**bits - 1
    for row, new in zip(before, found):
        low, high = min(row.min(), 0), max(row.max(), 0)
        if symmetric:
            low, high = -max(high, -low), max(high, -low)
        scale = (high - low) / top
        zero = 2 ** (bits - 1) if symmetric else np.round(-low / scale)
        expected = scale * (np.clip(np.round(row / scale) + zero, 0, top) - zero)
        np.testing.assert_allclose(new, expected, rtol=1e-10)
    assert isinstance(run.grids["head.weight"], Affine)


def test_zeros_stay_zeros():
    run = run_of()
    with torch.no_grad():
        run.model.get_parameter("head.weight")[:, ::2] = 0
    Quantise(3)(run)
    assert not run.model.get_parameter("head.weight")[:, ::2].any()
    assert run.model.get_parameter("head.weight")[:, 1::2].any()


def test_settings_reach_the_class_and_fewer_bits_take_fewer_bytes(tmp_path):
    folder, metrics = lines(
        tmp_path,
        "+post.eight={_target_:techniques.post.quantise.Quantise,bits:8}",
        "+post.three={_target_:techniques.post.quantise.Quantise,bits:3,group:8,exclude:head}",
    )
    sizes = [metrics[name] for name in ("post/bytes", "post/eight/bytes", "post/three/bytes")]
    assert sizes == sorted(sizes, reverse=True)
    for name in ("eight", "three"):
        packed = folder / "post" / f"{name}.packed.safetensors"
        assert metrics[f"post/{name}/bytes"] == packed.stat().st_size
    state = load(folder / "post" / "three.packed.safetensors")
    spans = state["layers.0.weight"].unflatten(1, (-1, 8))
    assert all(len(span.unique()) <= 8 for row in spans for span in row)
    assert any(len(row.unique()) > 8 for row in state["head.weight"])


@pytest.mark.parametrize("bits", [1, 9])
def test_refuses_other_bits(bits):
    with pytest.raises(ValueError, match="bits: must be between 2 and 8"):
        Quantise(bits)
