import numpy as np
import pytest
import torch

from techniques.post import grids
from training.errors import UsageError


def weights(rows=5, columns=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 4])
def test_nearest_of_the_grids_values(bits, symmetric, group):
    """Against a search among all values that NumPy makes of the range."""
    weight = weights()
    found = grids.quantised(
        weight, *grids.minmax(weight, bits, group=group, symmetric=symmetric), bits
    )
    size = group or 12
    for row in range(5):
        for start in range(0, 12, size):
            part = weight[row, start : start + size].numpy()
            low, high = min(part.min(), 0), max(part.max(), 0)
            if symmetric:
                low, high = -max(-low, high), max(-low, high)
            step = (high - low) / (2**bits - 1)
            first = -(2 ** (bits - 1)) if symmetric else -np.round(-low / step)
            values = (first + np.arange(2**bits)) * step
            expected = np.abs(part[:, None] - values).min(1)
            error = np.abs(part - found[row, start : start + size].numpy())
            np.testing.assert_allclose(error, expected, rtol=0, atol=1e-12)


def test_zero_stays_zero_and_an_empty_row_too():
    weight = weights()
    weight[:, 3] = 0
    weight[2] = 0
    found = grids.quantised(weight, *grids.minmax(weight, 2), 2)
    assert (found[:, 3] == 0).all()
    assert (found[2] == 0).all()
    one_sided = weights().abs()
    scale, zero = grids.minmax(one_sided, 4)
    assert (zero == 0).all()
    torch.testing.assert_close(scale[:, 0] * 15, one_sided.amax(1), rtol=1e-14, atol=0)


def test_many_bits_change_nothing():
    weight = weights()
    found = grids.quantised(weight, *grids.minmax(weight, 16), 16)
    span = weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)
    assert ((found - weight).abs() <= span / (2**16 - 1) * 0.501).all()


def test_any_shape_is_rows_by_columns():
    weight = weights(6, 12).view(6, 3, 2, 2)
    scale, zero = grids.minmax(weight, 3)
    found = grids.quantised(weight, scale, zero, 3)
    assert scale.shape == (6, 1)
    assert found.shape == weight.shape
    assert found.flatten(1).equal(grids.quantised(weight.flatten(1), scale, zero, 3))


def test_what_float64_makes_of_a_float32_grid_is_float32s():
    """A code times a float32 scale is exact in float64, so that rounding once gives float32's."""
    weight = weights(20, 64).float()
    scale, zero = grids.minmax(weight, 4)
    wide = grids.quantised(weight.double(), scale.double(), zero.double(), 4)
    assert wide.float().equal(grids.quantised(wide.float(), scale, zero, 4))


def test_what_it_refuses():
    with pytest.raises(ValueError, match="bits"):
        grids.minmax(weights(), 0)
    with pytest.raises(UsageError, match="group"):
        grids.minmax(weights(), 4, group=5)
