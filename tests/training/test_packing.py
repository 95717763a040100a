import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from training.packing import Affine, Codebook, load, pack

ROWS, COLUMNS = 48, 60


class Tensors(nn.Module):
    """A state of given tensors."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)


def packed(path, grids=None, **tensors) -> int:
    content = pack(Tensors(**tensors), grids or {})
    path.write_bytes(content)
    return len(content)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.packed.safetensors"


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.numpy().tobytes() == expected.contiguous().numpy().tobytes()


def affine(matrix, scale, zero, bits):
    """Rounded to the grid by NumPy in float32, with codes."""
    w, s, z = (np.asarray(x, dtype=np.float32) for x in (matrix, scale, zero))
    top = np.float32(2) ** np.asarray(bits, dtype=np.float32) - 1
    codes = np.clip(np.round(w / s) + z, 0, top).astype(np.float32)
    return torch.from_numpy(s * (codes - z)), codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_is_its_codes_and_a_scale(path, bits):
    weight = drawn(ROWS, COLUMNS)
    scale = weight.abs().amax(1, keepdim=True) * 2 / (2**bits - 1)
    value, _ = affine(weight, scale, 2 ** (bits - 1), bits)
    size = packed(path, {"w": Affine(scale, 2 ** (bits - 1), bits)}, w=value)
    same_bits(load(path)["w"], value)
    content = math.ceil(ROWS * COLUMNS * bits / 8) + 4 * ROWS
    assert size < content + 300
    assert bits == 1 or size > content  # one bit's values are nearly all 0: a mask is shorter


@pytest.mark.parametrize("groups", [1, 5, COLUMNS])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_scales_and_zeros_of_groups(path, rows, groups):
    weight = drawn(ROWS, COLUMNS)
    scale = 0.1 + drawn(rows, groups, seed=1).abs()
    zero = torch.randint(0, 8, (rows, groups), generator=torch.Generator().manual_seed(2))
    wide = [x.repeat_interleave(COLUMNS // groups, 1).expand(ROWS, -1) for x in (scale, zero)]
    value, _ = affine(weight, wide[0], wide[1], 3)
    packed(path, {"w": Affine(scale, zero, 3)}, w=value)
    same_bits(load(path)["w"], value)


def test_bits_of_each_row_and_none_for_removed_ones(path):
    weight = drawn(ROWS, COLUMNS)
    bits = torch.arange(ROWS)[:, None] % 9
    zero = torch.where(bits > 0, 2.0 ** (bits - 1), 0)
    value, _ = affine(weight, torch.full((ROWS, 1), 0.25), zero, bits)
    assert not value[bits.flatten() == 0].any()
    size = packed(path, {"w": Affine(torch.tensor(0.25), zero, bits)}, w=value)
    same_bits(load(path)["w"], value)
    assert size < COLUMNS * int(bits.sum()) // 8 + 4 * ROWS + 400


def test_bits_of_each_column(path):
    weight = drawn(ROWS, COLUMNS)
    bits = (torch.arange(COLUMNS) % 4)[None] * 2
    zero = 2.0 ** (bits - 1) * (bits > 0)
    scale = torch.full((1, COLUMNS), 0.1)
    value, _ = affine(weight, scale.expand(ROWS, -1), zero, bits)
    size = packed(path, {"w": Affine(scale, zero, bits)}, w=value)
    same_bits(load(path)["w"], value)
    assert size < ROWS * int(bits.sum()) // 8 + 3 * COLUMNS + 500


@pytest.mark.parametrize(("levels", "bits"), [(1, 0), (2, 1), (3, 2), (16, 4), (17, 5)])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_codebook(path, rows, levels, bits):
    book = drawn(rows, levels)
    places = torch.randint(levels, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(1))
    value = book.expand(ROWS, -1).gather(1, places)
    size = packed(path, {"w": Codebook(book)}, w=value)
    same_bits(load(path)["w"], value)
    content = math.ceil(ROWS * COLUMNS * bits / 8) + 4 * book.numel()
    assert size < content + 300


@pytest.mark.parametrize("shape", [(7,), (5, 6, 2, 3), (3, 0), ()])
def test_any_shape(path, shape):
    scale = torch.tensor(0.5)
    value = drawn(*shape).mul(4).round().clamp(-8, 7) * 0.5 + 0
    packed(path, {"w": Affine(scale, 8, 4)}, w=value)
    same_bits(load(path)["w"], value)


def test_zeros_are_a_mask(path):
    value = drawn(ROWS, COLUMNS)
    value[torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) < 0.9] = 0
    size = packed(path, w=value)
    same_bits(load(path)["w"], value)
    content = ROWS * COLUMNS // 8 + 4 * int(value.count_nonzero())
    assert content < size < content + 300
    value[value == 0] = -0.0
    packed(path, w=value)
    same_bits(load(path)["w"], value + 0)


def test_zeros_of_a_quantised_tensor_are_a_mask_where_that_is_shorter(path):
    value, _ = affine(drawn(ROWS, COLUMNS), 0.01, 128, 8)
    grids = {"w": Affine(torch.tensor(0.01), 128, 8)}
    dense = packed(path, grids, w=value)
    value[torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    size = packed(path, grids, w=value)
    same_bits(load(path)["w"], value)
    assert size < 0.7 * dense
    assert size < ROWS * COLUMNS // 8 + int(value.count_nonzero()) + 300


def test_half_precision_scales_are_kept_so(path):
    scale = drawn(ROWS, 1).abs().half().float() + 0.5
    value, _ = affine(drawn(ROWS, COLUMNS), scale, 8, 4)
    size = packed(path, {"w": Affine(scale, 8, 4)}, w=value)
    same_bits(load(path)["w"], value)
    assert size < ROWS * COLUMNS // 2 + 2 * ROWS + 200


def test_a_grid_that_is_not_the_tensors_is_left_aside(path):
    value, _ = affine(drawn(ROWS, COLUMNS), 0.25, 8, 4)
    for grid in (
        Affine(torch.tensor(0.25), 8, 4),
        Affine(torch.full((ROWS + 1, 1), 0.25), 8, 4),
        Codebook(0.25 * (torch.arange(16.0)[None] - 8)),
    ):
        quantised = packed(path, {"w": grid}, w=value)
        moved = value.clone()
        moved[3, 4] = torch.nextafter(moved[3, 4], torch.tensor(9.0))
        size = packed(path, {"w": grid}, w=moved)
        same_bits(load(path)["w"], moved)
        assert size >= moved.nbytes * 0.8
        assert quantised <= size


def test_a_dense_model_has_its_plain_size(path, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.Linear(40, 5))
    path.write_bytes(pack(model, {}))
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    plain = (tmp_path / "plain.safetensors").stat().st_size
    # Batch norm's mean and bias are zeros at the start, its counter is a whole number.
    assert 0.9 * plain < path.stat().st_size <= plain + 200
    found = load(path)
    assert list(found) == list(model.state_dict()) or found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        same_bits(found[name], value)


def test_what_modules_share_is_there_once(path):
    first = nn.Linear(20, 20, bias=False)
    second = nn.Linear(20, 20, bias=False)
    second.weight = first.weight
    with torch.no_grad():
        first.weight.copy_(first.weight.mul(8).round() / 8)
    grid = Affine(torch.tensor(0.125), 8, 4)
    size = len(pack(first, {"weight": grid}))
    path.write_bytes(pack(nn.Sequential(first, second), {"1.weight": grid}))
    assert size < 600
    assert path.stat().st_size < size + 100
    found = load(path)
    same_bits(found["0.weight"], first.weight.detach() + 0)
    same_bits(found["1.weight"], first.weight.detach() + 0)


def test_the_file_is_the_same_each_time():
    value, _ = affine(drawn(ROWS, COLUMNS), 0.25, 8, 4)
    grids = {name: Affine(torch.tensor(0.25), 8, 4) for name in "abcd"}
    model = Tensors(**dict.fromkeys("abcd", value.clone()))
    assert len({pack(model, grids) for _ in range(5)}) == 1
