import math

import pytest
import torch
from scipy.linalg import hadamard
from torch import nn

from techniques.init.zero_init_hadamard import matrix, zero_init_hadamard


@pytest.mark.parametrize(("rows", "columns"), [(8, 3), (10, 7), (16, 16), (3, 8), (33, 32)])
def test_algorithm_1(rows, columns):
    """Against SciPy's Hadamard matrix and explicit partial identities."""
    if rows <= columns:
        expected = torch.eye(rows, columns)
    else:
        m = math.ceil(math.log2(rows))
        h = torch.tensor(hadamard(2**m)).float() / 2 ** (m / 2)
        expected = torch.eye(rows, 2**m) @ h @ torch.eye(2**m, columns)
    torch.testing.assert_close(matrix(rows, columns), expected)


def test_only_zeros_and_one_magnitude():
    assert set(matrix(10, 7).abs().unique().tolist()) == {2**-2}
    assert set(matrix(7, 10).unique().tolist()) == {0.0, 1.0}


def test_model_starts_deterministic_with_its_convolutions_at_the_centre():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 10))
    zero_init_hadamard(model, {})
    images = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(model[0](images), images)
    torch.testing.assert_close(model(images), images.flatten(1)[:, :10])


def test_refuses_a_model_without_layers():
    with pytest.raises(ValueError, match="no linear"):
        zero_init_hadamard(nn.ReLU(), {})
