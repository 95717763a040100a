"""What stages kept of a training set: `selection/<name>.json` and pictures of a run's folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from study import plots
from tasks.fetch import fetch
from training.files import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure

FOLDER = "selection"
BINS = 40
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
EXAMPLES = 5
"""Samples shown of the lowest and of the highest scores."""
PICTURES = 8
"""The same, where samples are images."""
CHARACTERS = 400
GROUPS = 20
"""Most groups of samples, domains or classes, that are counted one by one."""


def describe(
    scores: np.ndarray, kept: np.ndarray, weights: np.ndarray | None, found: bool
) -> dict[str, Any]:
    """Counts, threshold, quantiles and histogram of scores and of those kept.

    Args:
        scores: (samples,).
        kept: indices; one may be there several times.
        weights: of those kept.
        found: whether the scores were in the cache.
    """
    is_kept = np.zeros(len(scores), dtype=bool)
    is_kept[kept] = True
    edges = np.histogram_bin_edges(scores, BINS)
    return {
        "samples": len(scores),
        "kept": int(is_kept.sum()),
        "drawn": len(kept),
        "threshold": _threshold(scores[is_kept], scores[~is_kept]),
        "quantiles": {f"{q:g}": float(np.quantile(scores, q)) for q in QUANTILES},
        "weights": None if weights is None else [float(weights.min()), float(weights.max())],
        "from_cache": found,
        "histogram": {
            "edges": edges.tolist(),
            "kept": np.histogram(scores[is_kept], edges)[0].tolist(),
            "dropped": np.histogram(scores[~is_kept], edges)[0].tolist(),
        },
    }


def examples(dataset: "Dataset", task: Any, scores: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """Samples of the lowest and of the highest scores, and how many of each domain or class are
    kept."""
    order, is_kept = np.argsort(scores, kind="stable"), set(kept.tolist())
    shown: dict[str, list[dict[str, Any]]] = {}
    for name, indices in (("lowest", order[:EXAMPLES]), ("highest", order[::-1][:EXAMPLES])):
        shown[name] = [
            {
                "index": int(i),
                "score": float(scores[i]),
                "kept": int(i) in is_kept,
                "text": _text(fetch(dataset, [int(i)]), task),
            }
            for i in indices
        ]
    pictures = [_pictures(dataset, task, i[:PICTURES]) for i in (order, order[::-1])]
    return {
        "groups": _groups(dataset, task, kept),
        "examples": shown,
        "pictures": None if pictures[0] is None else pictures,
    }


def save(about: dict[str, Any], folder: Path, name: str) -> None:
    """Write `selection/<name>.json`, `<name>.png` and, of images, `<name>-examples.png`."""
    path = folder / FOLDER
    path.mkdir(exist_ok=True)
    pictures = about["pictures"]
    if pictures is not None:
        plots.save(_grid(pictures), path / f"{name}-examples.png")
    about = {**about, "pictures": pictures and f"{name}-examples.png"}
    plots.save(histogram(about), path / f"{name}.png")
    write_atomically(path / f"{name}.json", json.dumps(about, indent=1))


def found(folder: Path) -> dict[str, dict[str, Any]]:
    """By name the selections of a run's folder."""
    paths = sorted((folder / FOLDER).glob("*.json"))
    return {path.stem: json.loads(path.read_bytes()) for path in paths}


def histogram(about: dict[str, Any]) -> "Figure":
    """Scores of the samples, those kept and those dropped, and the threshold between them."""
    drawn = plots.figure(8, 3.5)
    axes = drawn.add_subplot()
    edges, kept = np.array(about["histogram"]["edges"]), about["histogram"]["kept"]
    width, dropped = np.diff(edges), about["histogram"]["dropped"]
    axes.bar(edges[:-1], kept, width, align="edge", color=plots.COLOURS[2], label="kept")
    grey = plots.COLOURS[6]
    axes.bar(edges[:-1], dropped, width, kept, align="edge", color=grey, label="dropped")
    if about["threshold"] is not None and about["kept"] < about["samples"]:
        axes.axvline(about["threshold"], color=plots.COLOURS[1], lw=1, label="threshold")
    axes.set_xlabel("score")
    axes.set_ylabel("samples")
    axes.set_title(f"{about['kept']:,} of {about['samples']:,} samples kept", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return drawn


def _threshold(kept: np.ndarray, dropped: np.ndarray) -> float | None:
    """The last kept score on the side of those dropped, unless the two overlap."""
    if not len(dropped) or kept.max() <= dropped.min():
        return float(kept.max())
    return float(kept.min()) if kept.min() >= dropped.max() else None


def _groups(dataset: "Dataset", task: Any, kept: np.ndarray) -> dict[str, list[int]]:
    """By domain or class: samples before, and samples kept."""
    column = next((name for name in ("domain", "labels") if name in dataset.column_names), None)
    values = np.asarray(dataset[column]) if column else np.empty(0)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        return {}
    known, before = np.unique(values, return_counts=True)
    if not 1 < len(known) <= GROUPS:
        return {}
    names = list(task.domains) if column == "domain" else range(int(known.max()) + 1)
    after = [int((values[kept] == value).sum()) for value in known]
    return {str(names[v]): [int(n), k] for v, n, k in zip(known, before, after)}


def _text(row: dict[str, Any], task: Any) -> str | None:
    decode = getattr(getattr(task, "tokenizer", None), "decode", None)
    if "tokens" not in row or decode is None:
        return None
    return decode(row["tokens"][0].tolist())[:CHARACTERS]


def _pictures(dataset: "Dataset", task: Any, indices: np.ndarray) -> np.ndarray | None:
    """The samples as images in [0, 1], (samples, height, width, 1 or 3)."""
    generator = torch.Generator().manual_seed(0)
    batch = task.prepare(fetch(dataset, indices.tolist()), generator, False)
    pixels = batch.get("pixel_values")
    if pixels is None or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        return None
    low, high = (end(pixels, dim=(1, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
    return ((pixels - low) / (high - low).clamp(min=1e-6)).permute(0, 2, 3, 1).numpy()


def _grid(pictures: list[np.ndarray]) -> "Figure":
    drawn = plots.figure(PICTURES, 2.4)
    axes = drawn.subplots(len(pictures), PICTURES, squeeze=False)
    for line, images, name in zip(axes, pictures, ("lowest", "highest")):
        line[0].set_title(f"{name} scores", fontsize=8, loc="left")
        for panel in line:
            panel.axis("off")
        for panel, image in zip(line, images):
            panel.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray")
    return drawn
