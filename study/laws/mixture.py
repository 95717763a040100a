"""Loss of parameters, tokens, and what mixture of domains the tokens are of."""

from dataclasses import replace

import torch
from scipy.optimize import minimize
from torch import Tensor

from study.laws import WEIGHT, Columns, Coordinates, Law


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log(E + 1/Σᵢ Cᵢ·hᵢ^γᵢ + A/N^α + B/D^β), with hᵢ the domains' weights."""
    n, d = data["parameters"].log(), data["tokens"].log()
    terms = (
        law["log_E"] + torch.zeros_like(n),
        -useful(law, data).log(),
        law["log_A"] - law["alpha"] * n,
        law["log_B"] - law["beta"] * d,
    )
    return torch.stack(torch.broadcast_tensors(*terms)).logsumexp(0)


def useful(law: Coordinates, data: Columns) -> Tensor:
    """Σᵢ Cᵢ·hᵢ^γᵢ, what the mixture is worth to the loss: the more the lower it is."""
    names = [name.removeprefix(WEIGHT) for name in data if name.startswith(WEIGHT)]
    scales, powers = (
        torch.stack([law[f"log_{kind}_{i}"] for i in names]).exp() for kind in ("C", "gamma")
    )
    weights = torch.stack([data[WEIGHT + i] for i in names])[:, None]
    return (scales * weights**powers).sum(0)


def optimum(values: dict[str, float]) -> dict[str, float]:
    """Weights by domain of which the law's loss is lowest, whatever the parameters and tokens.

    Args:
        values: coordinates of a fitted law.
    """
    law = {name: torch.tensor([[value]], dtype=torch.float64) for name, value in values.items()}
    names = [n.removeprefix("log_C_") for n in values if n.startswith("log_C_")]

    def negative(logits: Tensor) -> Tensor:
        shares = logits.softmax(0)
        return -useful(law, {f"{WEIGHT}{n}": h[None] for n, h in zip(names, shares)}).log().sum()

    def with_gradient(point: object) -> tuple[float, object]:
        logits = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        value = negative(logits)
        (gradient,) = torch.autograd.grad(value, logits)
        return value.item(), gradient.numpy()

    starts = [torch.zeros(len(names)), *(4.0 * torch.eye(len(names)))]
    found = [minimize(with_gradient, s.double().numpy(), jac=True) for s in starts]
    best = min(found, key=lambda result: result.fun)
    return dict(zip(names, torch.tensor(best.x).softmax(0).tolist()))


def of(domains: tuple[str, ...]) -> Law:
    """The law of these domains."""
    worth = (
        " + ".join(f"C_{i}*{WEIGHT}{i}^gamma_{i}" for i in domains) or "sum C_i*weight_i^gamma_i"
    )
    own = {f"log_C_{i}": (-1.0, 1.0) for i in domains} | {
        f"log_gamma_{i}": (-1.0,) for i in domains
    }
    return replace(
        LAW,
        formula=LAW.formula.replace("sum C_i*weight_i^gamma_i", worth),
        columns=(*LAW.columns, *(f"{WEIGHT}{i}" for i in domains)),
        starts=LAW.starts | own,
    )


LAW = Law(
    formula="E + 1/(sum C_i*weight_i^gamma_i) + A/parameters^alpha + B/tokens^beta",
    source=(
        '"Scaling Laws for Optimal Data Mixtures", arXiv 2507.09404, the additive law; no code of '
        "its authors was found. They start L-BFGS at random and hop from basin to basin"
    ),
    columns=("parameters", "tokens"),
    log_loss=log_loss,
    starts={
        "log_E": (-3.0, -1.0, 0.0, 0.5),
        "log_A": (0.0, 3.0, 6.0, 12.0),
        "log_B": (0.0, 3.0, 6.0, 12.0),
        "alpha": (0.2, 0.5),
        "beta": (0.2, 0.5),
    },
    exponents=("alpha", "beta"),
    domains=of,
)
