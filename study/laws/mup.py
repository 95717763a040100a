"""Loss of parameters, of models of growing width under the maximal update parametrisation."""

from dataclasses import replace

import torch
from torch import Tensor

from study.laws import Columns, Coordinates, power


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log(a·C^b + c)."""
    grown = law["log_a"] + law["b"] * data["parameters"].log()
    return torch.logaddexp(grown, law["log_c"])


LAW = replace(
    power.LAW,
    formula="a*parameters^b + c",
    source=(
        '"Research without Re-search", arXiv 2304.06875; https://github.com/cofe-ai/Mu-scaling, '
        "fit_scale_loss_prediction.py, by least squares. The models differ in width alone and "
        "share the learning rate of a small one (technique=mup)"
    ),
    columns=("parameters",),
    log_loss=log_loss,
    starts={
        "log_a": power.LAW.starts["log_A"],
        "b": tuple(-alpha for alpha in power.LAW.starts["alpha"]),
        "log_c": power.LAW.starts["log_E"],
    },
    exponents=("b",),
)
