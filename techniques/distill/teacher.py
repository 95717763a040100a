"""A teacher: another model, whose logits the training losses find in their batches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.cache import cached, dataset_digest, digest, model_digest
from tasks.fetch import fetch
from tasks.losses import IGNORED, precise
from training.components import call, offered
from training.data import move
from training.errors import UsageError
from training.objective import Batch, inputs_of, predict
from training.trained import model_of

if TYPE_CHECKING:
    from training.run import Run

DTYPES = ("float32", "float16")
CLASSES = ("num_classes", "out_features", "vocab_size")
KEY = "teacher_logits"


class Teacher:
    """Puts `teacher_logits`, detached and shaped like the model's logits, into every training batch
    for the time of the objective's forward.

    The teacher is in evaluation mode, under the run's autocast and without gradients; it is no part
    of the objective, so it is neither trained nor in the checkpoints. Every process has it whole,
    under FSDP2 too. Its logits are made a micro-batch at a time and dropped after the micro-batch's
    forward, so that beside its weights it needs the memory of one micro-batch's logits, however
    large the vocabulary and many the micro-batches; a gradient estimator that goes forward twice
    (SAM) asks it twice.

    Args:
        of: a run's folder, of which the newest whole checkpoint is the teacher, or a checkpoint's
            folder in it; its `config.yaml` says what the model is.
        model: in place of `of` a component that makes a model, as in `conf/model/`: `_target_` and
            keys. Without trained weights they are drawn from the run's seed.
        cache: ask the teacher once for each sample of the training set, before the first step, and
            read its logits from a memory-mapped file of `samples · positions · classes` numbers
            in the cache (`tasks.cache`) from then on. It is found again by the contents of the
            teacher's weights and of the dataset. Refused where a sample does not always look the
            same (augmentation, masking, `data.batch`).
        dtype: of the file: "float32", or "float16" (half the size; rounded to 11 bits).
        trust: import what the folder's configuration names from whatever package; otherwise from
            known ones alone, as `assay export` does.

    Raises:
        ValueError: without exactly one of `of` and `model`, or for another `dtype`.
        UsageError: at the start, for a folder without a checkpoint, a model that does not work on
            the task or has another number of classes, or a cache that would be wrong.

    Source: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; no code of its own.
    """

    model: nn.Module

    def __init__(
        self,
        of: str | None = None,
        model: Callable[..., nn.Module] | None = None,
        cache: bool = False,
        dtype: str = "float32",
        trust: bool = False,
    ) -> None:
        if (of is None) == (model is None):
            raise ValueError("of, model: exactly one of them, a run's folder or a model component")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: one of {', '.join(DTYPES)}, got '{dtype}'")
        self.of, self.make = of, model
        self.cache, self.dtype, self.trust = cache, dtype, trust
        self.stored: np.ndarray | None = None

    def on_fit_start(self, run: "Run") -> None:
        """Load the teacher, and hand its logits to the objective from here on."""
        devices = [run.device] if run.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # a resumed run's state is there already
            torch.manual_seed(run.config["seed"])
            self.model, about = self._of_folder(run) if self.of else self._of_component(run)
            self.model = self.model.to(run.device).eval().requires_grad_(False)
            self._try(run)
            if self.cache:
                self.stored = self._store(run, about)

        def give(objective: nn.Module, inputs: tuple[Batch]) -> None:
            inputs[0][KEY] = self._logits(run, inputs[0])

        def take(objective: nn.Module, inputs: tuple[Batch], losses: Any) -> None:
            inputs[0].pop(KEY, None)

        run.objective.register_forward_pre_hook(give)
        run.objective.register_forward_hook(take)

    def _logits(self, run: "Run", batch: Batch) -> Tensor:
        if self.stored is None:
            return self._ask(run, batch)
        return torch.from_numpy(self.stored[batch["index"].cpu().numpy()]).to(run.device)

    def _ask(self, run: "Run", batch: Batch) -> Tensor:
        with torch.no_grad(), run.accelerator.autocast():
            return predict(self.model, batch)["logits"]

    def _of_folder(self, run: "Run") -> tuple[nn.Module, str]:
        """The model of a run's folder, and what it is beside its weights."""
        assert self.of is not None
        return model_of(self.of, run.accelerator, "callbacks.teacher.of", self.trust)

    def _of_component(self, run: "Run") -> tuple[nn.Module, str]:
        """The model of a component, and what it is beside its weights."""
        assert self.make is not None
        where, keys = "callbacks.teacher.model", getattr(self.make, "keywords", {})
        dims = offered(self.make, run.task.dims)
        if keys.get("pretrained") and keys.get("path"):
            dims.pop("num_classes", None)  # else another number of them would get a new classifier
        model = call(self.make, where, **dims)
        trained = getattr(getattr(model, "model", None), "pretrained_cfg", None) or {}
        if keys.get("pretrained") and trained.get("num_classes", None) not in (None, _classes(run)):
            raise UsageError(
                f"{where}: its weights are for {trained['num_classes']} classes, the task has "
                f"{_classes(run)}"
            )
        name = next(name for name, callback in run.callbacks.items() if callback is self)
        return model, json.dumps(run.config["callbacks"][name]["model"])

    def _try(self, run: "Run") -> None:
        """Ask for one sample's logits, so that what does not fit shows before training."""
        batch = _prepared(run, torch.tensor([0]))
        try:
            classes = self._ask(run, batch).shape[-1]
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
            shapes = ", ".join(
                f"{name} {tuple(x.shape)}" for name, x in batch.items() if isinstance(x, Tensor)
            )
            raise UsageError(
                f"callbacks.teacher: {type(self.model).__name__} does not work on the task's "
                f"batches ({shapes}): {' '.join(str(error).split())[:200]}"
            ) from error
        if classes != _classes(run):
            raise UsageError(
                f"callbacks.teacher: it has {classes} classes, the task {_classes(run)}"
            )

    def _store(self, run: "Run", about: str) -> np.ndarray:
        """The logits of the whole training set, (samples, ...), from the cache or into it."""
        if run.config["data"]["batch"]:
            raise UsageError("callbacks.teacher.cache: data.batch changes samples; cache: false")
        self._check_same(run)
        count, size = len(run.task.train), run.config["trainer"]["batch_size"]
        how = json.dumps([run.config["task"], run.config["trainer"]["precision"], self.dtype])
        key = digest([model_digest(self.model), about, dataset_digest(run.task.train), how])

        def build(folder: Path) -> None:
            file = None
            for rows in torch.arange(count).split(size):
                values = self._ask(run, _prepared(run, rows)).float().cpu().numpy()
                with np.errstate(over="ignore"):  # told below
                    values = values.astype(self.dtype)
                if not np.isfinite(values).all():
                    raise UsageError(
                        f"callbacks.teacher.dtype: some logits are not finite in {self.dtype}"
                    )
                if file is None:
                    shape = (count, *values.shape[1:])
                    file = np.lib.format.open_memmap(folder / "logits.npy", "w+", self.dtype, shape)
                file[rows.numpy()] = values
            assert file is not None
            file.flush()

        with run.accelerator.local_main_process_first():
            path = cached("teacher", key, build)
        return np.load(path / "logits.npy", mmap_mode="r")

    def _check_same(self, run: "Run") -> None:
        """Refuse a task that shows the teacher a sample in more than one way."""
        rows = torch.arange(min(32, len(run.task.train)))
        first, second = (_prepared(run, rows, seed) for seed in (0, 1))
        for name in inputs_of(self.model) & first.keys():
            if not torch.equal(first[name], second[name]):
                raise UsageError(
                    f"callbacks.teacher.cache: the task draws {name} anew each time; cache: false, "
                    "or no augmentation"
                )


def both_logits(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The model's and the teacher's logits, (..., classes), in float32 at least.

    Raises:
        UsageError: without a teacher, or with one of other logits.
    """
    student, teacher = outputs["logits"], batch.get(KEY)
    if teacher is None:
        raise UsageError("task.loss: distillation needs a teacher, callbacks.teacher")
    if teacher.shape != student.shape:
        raise UsageError(
            f"callbacks.teacher: its logits are of shape {tuple(teacher.shape)}, the model's of "
            f"{tuple(student.shape)}"
        )
    return precise(student), precise(teacher)


def label_log_p(log_p: Tensor, labels: Tensor) -> Tensor:
    """Of log-probabilities (..., classes) the labels' (...), 0 where a label is −100."""
    ignored = labels == IGNORED
    found = log_p.gather(-1, labels.masked_fill(ignored, 0)[..., None]).squeeze(-1)
    return found.masked_fill(ignored, 0.0)


def _prepared(run: "Run", rows: Tensor, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch = run.task.prepare(fetch(run.task.train, rows), generator, True)
    return move(batch, run.device)


def _classes(run: "Run") -> int | None:
    return next((run.task.dims[name] for name in CLASSES if name in run.task.dims), None)
