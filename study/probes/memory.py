"""The memory of a training step, and what saving it costs."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from training.objective import Losses
    from training.run import Run

MIB = 2**20


aten = torch.ops.aten
LIKE = {  # what torch's registry lacks: products in place, the CPU's attention
    aten.addmm_: aten.addmm,
    aten.baddbmm_: aten.baddbmm,
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}
FLOPS = flop_registry | {function: flop_registry[like] for function, like in LIKE.items()}
"""Formulas of torch's FLOP counter: matrix products, convolutions and fused attention."""


class StepMemory:
    """Records of the second step's forward and backward the peak memory, in MiB, as
    `probe/step_memory`: the bytes of all tensors alive at once that the step made; the FLOPs of
    its products as `probe/step_flops`; and those of them that were recomputed as
    `probe/recomputed_flops` (see `Flops`). The second, because what is made once (a tokenizer's
    table, a compiled kernel) is there by then. FLOPs are the process's own.

    On a GPU the memory is the allocator's peak above what was there before the step. What a code
    generator fuses under `trainer.compile`, and Triton's kernels, have no FLOPs.
    """

    def on_batch(self, run: "Run") -> None:
        """Measure the second step's gradient."""
        if run.step != 1:
            return
        inner = run.gradient

        def measured(*args: Any) -> "Losses":
            run.gradient = inner
            found: dict[str, float] = {}
            with peak(run.device, found), Flops() as flops:
                losses = inner(*args)
            found |= {"step_flops": flops.total, "recomputed_flops": flops.recomputed}
            run.record({f"probe/{name}": float(value) for name, value in found.items()})
            return losses

        run.gradient = measured


@contextlib.contextmanager
def peak(device: torch.device, found: dict[str, float]) -> Iterator[None]:
    """Put the peak memory of what is done within into `found`, as `step_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        most = torch.cuda.max_memory_allocated(device) - before
    else:
        with Live() as live:
            yield
        most = live.peak
    found["step_memory"] = most / MIB


class Flops(TorchDispatchMode):
    """`total` is the FLOPs of the matrix products, convolutions and fused attention done within,
    and `recomputed` those of them done in a backward pass on operands that do not depend on the
    gradient that flows back.

    Gradients are linear in what flows back, so every product of a gradient's formula has an operand
    that depends on it, and one that has none repeats the forward's work (or does other work that
    the backward alone needs). What depends on it is followed from storage to storage, from the 1
    that `loss.backward()` and `torch.autograd.grad(loss, ...)` begin with. Scores that a fused
    attention's backward makes again are in `total` alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.recomputed = 0
        self.gradients: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:  # what it does comes by again
            return NotImplemented
        kwargs = kwargs or {}
        dependent = any(s._cdata in self.gradients for s in _storages((args, kwargs)))
        out = function(*args, **kwargs)
        if dependent or (function is aten.ones_like.default and not out.ndim):
            self._follow(out)
        if formula := FLOPS.get(function._overloadpacket):
            flops = formula(*args, **kwargs, out_val=out)
            self.total += flops
            if not dependent and torch._C._current_graph_task_id() != -1:
                self.recomputed += flops
        return out

    def _follow(self, out: Any) -> None:
        for storage in _storages(out):
            if storage._cdata not in self.gradients:
                self.gradients.add(storage._cdata)
                weakref.finalize(storage, self.gradients.discard, storage._cdata)


class Live(TorchDispatchMode):
    """`peak` is the most bytes that were alive at once, of tensors made within."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {s._cdata for s in _storages((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in given:  # a view of what was there before is not made within
                self._meet(storage)
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._lose, key)

    def _lose(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
