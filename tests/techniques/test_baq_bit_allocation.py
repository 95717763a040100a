import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from techniques.post import grids
from techniques.post.baq_bit_allocation import BAQ, allocated, rounding, spans_of, unevenness
from techniques.post.gptq import compensated
from techniques.post.layers import linear_layers
from techniques.post.layers import matrix as matrix_of
from tests.conformance.runs import tiny
from training import packing
from training.assemble import assemble


def test_bits_are_the_minimum_at_their_mean():
    """Against SciPy's constrained minimum of Σ loss_j · 2^(−2(R_j − R)); the losses are then all
    equal. Levels are so many that rounding them hardly counts."""
    given = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3
    found = allocated(given, 20, 2.0, whole=False).log2().numpy()
    result = minimize(
        lambda r: (given.numpy() * 2 ** (-2 * (r - 20))).sum(),
        np.full(7, 20.0),
        constraints={"type": "eq", "fun": lambda r: r.mean() - 20},
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    np.testing.assert_allclose(found, result.x, atol=1e-4)
    equal = given.numpy() * 2 ** (-2 * (found - 20))
    np.testing.assert_allclose(equal, equal[0], rtol=1e-4)


def test_levels_of_the_authors_formula():
    given = np.array([4.0, 1.0, 1e-6, 0.25])
    mean = np.exp(np.log(given + 1e-8).mean())
    expected = np.round(np.maximum((given / mean * 2 ** (1.95 * 3)) ** (1 / 1.95), 1))
    found = allocated(torch.from_numpy(given), 3, 1.95, whole=False)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    powers = allocated(torch.from_numpy(given), 3, 1.95, whole=True).log2()
    assert powers.equal(powers.round())
    assert allocated(torch.tensor([1.0, 0.0]).double(), 2, 2.0, whole=False)[1] == 1


def test_equal_losses_are_gptq():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 8, generator=generator)
    spans = spans_of(weight, allocated(torch.full((8,), 0.7).double(), 3, 1.95, whole=False))
    nearest = rounding(spans)
    scale, zero = grids.minmax(weight, 3)
    column = torch.randn(5, generator=generator, dtype=torch.float64)
    expected = grids.quantised(column[:, None], scale.double(), zero.double(), 3)[:, 0]
    for i in range(8):
        torch.testing.assert_close(nearest(column, i), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("levels", [[1, 2, 3, 5, 8, 1], [4] * 6])
def test_each_column_is_on_its_own_grid_and_packs_to_the_bit(levels):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(9, 6, generator=generator)
    weight[3] = 0
    spans = spans_of(weight, torch.tensor(levels).double())
    found, _ = compensated(weight, torch.eye(6).double(), rounding(spans))
    for i, count in enumerate(levels):
        for row in range(9):
            low, high = min(float(weight[row].min()), 0), max(float(weight[row].max()), 0)
            step = (high - low) / max(count - 1, 1)
            values = (np.arange(count) - np.round(-low / step)) * step if step else np.zeros(1)
            if count == 1:
                values = np.zeros(1)
            nearest = values[np.abs(values - float(weight[row, i])).argmin()]
            assert float(found[row, i]) == pytest.approx(nearest, abs=1e-6)
    single = found.float()
    assert spans.values(spans.codes(single)).equal(single)
    wide = int(spans.widths(single.shape).sum())
    assert wide == 9 * sum((count - 1).bit_length() for count in levels)


def test_a_file_gives_the_tensor_back(tmp_path):
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    spans = spans_of(weight, torch.randint(1, 9, (32,)).double())
    layer = torch.nn.Linear(32, 64, bias=False)
    found, _ = compensated(weight, torch.eye(32).double(), rounding(spans))
    layer.weight.data = found.float() + 0.0
    content = packing.pack(layer, {"weight": spans})
    (tmp_path / "packed").write_bytes(content)
    assert packing.load(tmp_path / "packed")["weight"].equal(layer.weight)
    assert len(content) < 64 * 32 * 4 / 4


def test_unevenness_is_of_binary_logarithms():
    found = unevenness({"a": torch.tensor([1.0, 4.0, 0.0]), "b": torch.tensor([3.0, 3.0])})
    assert found == pytest.approx(np.std([0, 2], ddof=1) / 2)


@pytest.mark.parametrize("whole", [False, True])
def test_overlay_and_a_quantised_run(tmp_path, whole):
    settings = ("post.baq_bit_allocation.samples=8", f"post.baq_bit_allocation.whole={whole}")
    config, _ = tiny("baq_bit_allocation", tmp_path, "model.depth=1", *settings)
    run = assemble(config)
    (step,) = run.post.values()
    assert isinstance(step, BAQ)
    assert (step.bits, step.samples, step.decay) == (3, 8, 1.95)
    step.exclude = "head"
    step(run)
    for name, layer in linear_layers(run.model, "head").items():
        grid = run.grids[f"{name}.weight"]
        assert grid.values(grid.codes(matrix_of(layer))).equal(matrix_of(layer))
    recorded = run.recorded
    assert 2.5 < recorded["post/baq_bit_allocation/bits"] < 3.5
    uneven, uniform = (
        recorded[f"post/baq_bit_allocation/{x}"] for x in ("uneven", "uneven_uniform")
    )
    assert uneven < uniform


@pytest.mark.parametrize("settings", [{"bits": 0}, {"samples": 0}, {"decay": 0.0}])
def test_what_it_refuses(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        BAQ(**settings)
