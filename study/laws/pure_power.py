"""A power law without a floor, of one quantity."""

from torch import Tensor

from study.laws import Columns, Coordinates, Law


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log A − α · log x."""
    return law["log_A"] - law["alpha"] * data["x"].log()


LAW = Law(
    formula="A/x^alpha",
    source=(
        '"Scaling Laws for Neural Language Models", arXiv 2001.08361, equations 1.1 to 1.3, where '
        "A = xc^alpha"
    ),
    columns=("x",),
    log_loss=log_loss,
    starts={
        "log_A": (-5.0, 0.0, 1.0, 2.0, 5.0),
        "alpha": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    },
    exponents=("alpha",),
)
