"""Loss of parameters and tokens, as Chinchilla's third approach has it."""

import torch
from torch import Tensor

from study.laws import Columns, Coordinates, Law


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log(E + A/N^α + B/D^β), as a log-sum-exp."""
    n, d = data["parameters"].log(), data["tokens"].log()
    terms = (
        law["log_E"] + torch.zeros_like(n),
        law["log_A"] - law["alpha"] * n,
        law["log_B"] - law["beta"] * d,
    )
    return torch.stack(torch.broadcast_tensors(*terms)).logsumexp(0)


LAW = Law(
    formula="E + A/parameters^alpha + B/tokens^beta",
    source=(
        '"Training Compute-Optimal Large Language Models", arXiv 2203.15556, approach 3, with the '
        'procedure of "Chinchilla Scaling: A replication attempt", arXiv 2404.10102: the sum of '
        "Huber losses, not their mean, from a grid of starts; "
        "https://github.com/epoch-research/analyzing-chinchilla, data_analysis.ipynb"
    ),
    columns=("parameters", "tokens"),
    log_loss=log_loss,
    starts={
        "log_E": (-1.0, -0.5, 0.0, 0.5, 1.0),
        "log_A": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        "log_B": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        "alpha": (0.0, 0.5, 1.0, 1.5, 2.0),
        "beta": (0.0, 0.5, 1.0, 1.5, 2.0),
    },
    exponents=("alpha", "beta"),
)
