import numpy as np
import pytest
import torch
import torch.nn.functional as F

from techniques.activation.pade_activation_unit import PadeActivationUnit

NUMERATOR = (0.3, -1.0, 0.5, 0.25)
DENOMINATOR = (0.7, -2.0)


def test_is_the_ratio_of_polynomials():
    x = np.linspace(-4, 4, 81)
    above = np.polynomial.polynomial.polyval(x, NUMERATOR)
    below = 1 + np.abs(np.polynomial.polynomial.polyval(x, (0.0, *DENOMINATOR)))
    unit = PadeActivationUnit(NUMERATOR, DENOMINATOR).double()
    torch.testing.assert_close(unit(torch.from_numpy(x)), torch.from_numpy(above / below))


def test_starts_as_leaky_relu():
    x = torch.linspace(-3, 3, 601)
    with torch.no_grad():
        error = PadeActivationUnit()(x) - F.leaky_relu(x, 0.01)
    assert error.abs().max() < 0.05
    assert error.square().mean() < 1e-3


def test_degrees_are_five_and_four():
    unit = PadeActivationUnit()
    assert (len(unit.numerator), len(unit.denominator)) == (6, 4)


def test_has_no_pole():
    """1 − 2x + ... would have one at 1/2 without the absolute value."""
    unit = PadeActivationUnit((1.0,), (-2.0,)).double()
    x = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    assert unit(x).abs().max() <= 1


def test_gradients():
    """Of the input, away from 0 where the absolute value has a kink, and of the coefficients."""
    x = torch.linspace(-2, 2, 8, dtype=torch.float64, requires_grad=True)

    def function(x, numerator, denominator):
        unit = PadeActivationUnit(NUMERATOR, DENOMINATOR).double()
        return torch.func.functional_call(
            unit, {"numerator": numerator, "denominator": denominator}, (x,)
        )

    coefficients = [
        torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in (NUMERATOR, DENOMINATOR)
    ]
    assert torch.autograd.gradcheck(function, (x, *coefficients))


def test_half_precision_is_computed_wide():
    unit = PadeActivationUnit()
    x = torch.linspace(-3, 3, 101).bfloat16()
    assert unit(x).dtype == torch.bfloat16
    assert unit(x).equal(unit(x.float()).bfloat16())


@pytest.mark.parametrize("name", ["numerator", "denominator"])
def test_refuses_no_coefficients(name):
    with pytest.raises(ValueError, match=name):
        PadeActivationUnit(**{name: ()})
