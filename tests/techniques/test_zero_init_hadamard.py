import pytest
import torch
from scipy.linalg import hadamard
from torch import nn

from techniques.init.zero_init_hadamard import matrix, zero_init_hadamard


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (8, 4), (7, 5), (16, 1), (20, 17)])
def test_matrix_is_the_papers(shape):
    """I·H·I / 2^(m/2) with SciPy's Hadamard matrix where the layer widens."""
    rows, columns = shape
    if rows <= columns:
        expected = torch.eye(rows, columns)
    else:
        size = 1
        while size < rows:
            size *= 2
        middle = torch.from_numpy(hadamard(size)).float() / size**0.5
        expected = torch.eye(rows, size) @ middle @ torch.eye(size, columns)
    torch.testing.assert_close(matrix(rows, columns), expected)


def test_only_zeros_and_one_magnitude():
    assert matrix(7, 10).unique().tolist() == [0.0, 1.0]
    assert matrix(10, 7).abs().unique().tolist() == [2**-2]


def test_widening_by_a_power_of_two_keeps_lengths():
    x = torch.randn(10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    widened = x @ matrix(16, 5).double().T
    torch.testing.assert_close(widened.norm(dim=1), x.norm(dim=1))


def test_no_randomness_and_no_bias():
    first, second = nn.Linear(6, 10), nn.Linear(6, 10)
    for model in (first, second):
        zero_init_hadamard(model, {})
    assert first.weight.equal(second.weight)
    assert not first.bias.any()


def test_convolution_that_does_not_widen_copies_its_input():
    model = nn.Conv2d(4, 4, 3, padding=1)
    zero_init_hadamard(model, {})
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), x)


def test_convolution_that_widens_mixes_channels_at_each_pixel():
    model = nn.Conv2d(2, 4, 3, padding=1)
    zero_init_hadamard(model, {})
    x = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    mixed = torch.einsum("oi,bihw->bohw", torch.from_numpy(hadamard(4)[:, :2]).float() / 2, x)
    torch.testing.assert_close(model(x), mixed)


def updates_rank(widening: torch.Tensor) -> int:
    """Rank of the hidden layer's update by descent from a start whose first layer is `widening`."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16, bias=False), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    zero_init_hadamard(model, {})
    with torch.no_grad():
        layers[0].weight.copy_(widening)
    before = layers[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = torch.randn(64, 4), torch.randn(64, 16)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return int(torch.linalg.matrix_rank(layers[1].weight.detach() - before, tol=1e-4))


def test_hadamard_breaks_the_degeneracy_of_partial_identities():
    """The paper's theorem 1: from partial identities the update has at most the input's rank."""
    assert updates_rank(torch.eye(16, 4)) <= 4
    assert updates_rank(matrix(16, 4)) > 4


def test_refuses_a_model_without_layers():
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        zero_init_hadamard(nn.LayerNorm(4), {})
