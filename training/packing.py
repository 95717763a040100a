"""What a model takes on disk: every tensor in its shortest form, in one safetensors file.

A tensor that lies on a grid of few values is kept as codes, packed to their bits, and the grid; one
with many zeros as a mask of one bit a number and the others; any other as it is. Steps of `post`
say in `run.grids` what grid they put a parameter on. A grid that does not give the tensor to the
bit, as after training on, is left aside. What structured pruning leaves is smaller as it is.

In the file a tensor NAME is NAME itself, or NAME:codes or NAME:values, NAME:mask, and NAME:scale,
NAME:zero, NAME:bits, or NAME:low, NAME:high, NAME:levels, or NAME:codebook; the metadata has its
shape, and what of the grid is one whole number. What modules share is there once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from training.parallel import whole

ENTRY = 90
"""About what a tensor's name, type and place take in a safetensors file, in bytes."""


@dataclass(frozen=True)
class Affine:
    """The values scale·(code − zero) in float32, code from 0 to 2^bits − 1.

    For a tensor as a matrix (rows, columns), its dimensions after the first being one, each of the
    three is a number, or a matrix of (rows or 1, groups): as many groups of consecutive columns,
    all of one size. A row or column of 0 bits takes none and is −scale·zero.
    """

    scale: Tensor
    zero: Tensor | int
    bits: Tensor | int

    def widths(self, shape: torch.Size) -> Tensor:
        """Bits of each code, int64 of the matrix's shape."""
        return _spread(self.bits, shape).long()

    def codes(self, matrix: Tensor) -> Tensor:
        """The nearest codes, int64."""
        scale, zero = (_spread(x, matrix.shape).float() for x in (self.scale, self.zero))
        nearest = (matrix / scale + zero).nan_to_num(0).round().long()
        return nearest.clamp(min=0).minimum(2 ** self.widths(matrix.shape) - 1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, float32."""
        scale, zero = (_spread(x, codes.shape).float() for x in (self.scale, self.zero))
        return scale * (codes.float() - zero)


@dataclass(frozen=True)
class Codebook:
    """The values (rows or 1, levels), any of a row's; codes take ⌈log₂ levels⌉ bits."""

    levels: Tensor

    def widths(self, shape: torch.Size) -> Tensor:
        """Bits of each code, int64 of the matrix's shape."""
        return torch.full(shape, (self.levels.shape[1] - 1).bit_length())

    def codes(self, matrix: Tensor) -> Tensor:
        """The codes of values that are in the book, int64."""
        ordered, places = self.levels.expand(len(matrix), -1).sort(dim=1)
        found = torch.searchsorted(ordered, matrix.contiguous()).clamp(max=ordered.shape[1] - 1)
        return places.gather(1, found)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for."""
        return self.levels.expand(len(codes), -1).gather(1, codes)


@dataclass(frozen=True)
class Spans:
    """Each row's span (rows, 1) from `low` to `high`, which has 0 in it, cut into as many values as
    a column has `levels`, (1, columns): those of `affine`. Codes take ⌈log₂ levels⌉ bits."""

    low: Tensor
    high: Tensor
    levels: Tensor

    def affine(self) -> Affine:
        """The same as a grid for each number; of one level the only value is 0."""
        steps = self.levels.float() - 1
        scale = (self.high - self.low) / steps.clamp(min=1)
        zero = torch.where(steps > 0, (-self.low / scale).round(), 0)
        return Affine(scale, zero, (steps + 1).log2().ceil())

    def widths(self, shape: torch.Size) -> Tensor:
        """Bits of each code, int64 of the matrix's shape."""
        return self.affine().widths(shape)

    def codes(self, matrix: Tensor) -> Tensor:
        """The nearest codes, int64."""
        return self.affine().codes(matrix)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, float32."""
        return self.affine().values(codes)


class ShapeError(ValueError):
    """A grid is of a tensor of another shape."""


Grid = Affine | Codebook | Spans
Form = tuple[dict[str, Tensor], str]
"""A tensor's entries by the ending of their names, and its words in the metadata."""


def pack(model: nn.Module, grids: Mapping[str, Grid]) -> bytes:
    """The file's content. All processes call it, as it gathers what they share.

    Args:
        model: its state is packed; a reparametrised one with all that it trains.
        grids: by the name of a float32 tensor.
    """
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        names.setdefault(id(value), []).append(name)
    tensors: dict[str, Tensor] = {}
    about: list[str] = []
    for name, *others in names.values():
        plain = whole(state[name].detach()).cpu().contiguous()
        grid = next((grids[n] for n in (name, *others) if n in grids), None)
        entries, words = min(_forms(plain, grid), key=_size)
        tensors |= {f"{name}{ending}": part.contiguous() for ending, part in entries.items()}
        about += [f"{name} {words}"] if words else []
        about += [f"{other} ={name}" for other in others]
    return save(tensors, {"packed": "\n".join(about)} if about else None)


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a packed file by name, as they were to the bit; but −0 is 0 where codes or a
    mask stand for the tensor."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = (file.metadata() or {}).get("packed", "")
    same: dict[str, str] = {}
    for line in about.splitlines():
        name, first, *words = line.split()
        if first.startswith("="):
            same[name] = first[1:]
            continue
        parts = {key: tensors.pop(f"{name}:{key}") for key in PARTS if f"{name}:{key}" in tensors}
        parts |= {key: torch.tensor(int(x)) for key, x in (word.split("=") for word in words)}
        tensors[name] = _restored(parts, torch.Size(int(n) for n in first.split("x")))
    return tensors | {name: tensors[other] for name, other in same.items()}


PARTS = (
    *("codes", "values", "mask", "scale", "zero", "bits", "codebook"),
    *("low", "high", "levels"),
)


def _forms(value: Tensor, grid: Grid | None) -> Iterator[Form]:
    """The forms a tensor can be kept in."""
    yield {"": value}, ""
    if not value.ndim or not value.numel():
        return
    matrix = _matrix(value)
    words = "x".join(str(n) for n in value.shape)
    kept = matrix != 0
    mask = {":mask": _bits(kept)}
    yield {":values": matrix[kept], **mask}, words
    if grid is None or value.dtype != torch.float32:
        return
    grid = _on_cpu(grid)
    try:
        codes, widths = grid.codes(matrix), grid.widths(matrix.shape)
    except ShapeError:
        return
    if not grid.values(codes).equal(matrix):
        return
    entries, numbers = _described(grid)
    words = " ".join([words, *numbers])
    yield {":codes": _packed(codes, widths), **entries}, words
    yield {":codes": _packed(codes[kept], widths[kept]), **entries, **mask}, words


def _size(form: Form) -> int:
    entries, words = form
    return sum(part.nbytes + ENTRY for part in entries.values()) + len(words)


def _described(grid: Grid) -> tuple[dict[str, Tensor], list[str]]:
    """A grid's entries, and what of it is one whole number."""
    if isinstance(grid, Codebook):
        return {":codebook": _narrow(grid.levels)}, []
    entries, words = {}, []
    for key, value in vars(grid).items():
        first = value.flatten()[0]
        one = bool(value.eq(first).all())
        if one and first == first.round():
            words.append(f"{key}={int(first)}")
        else:
            entries[f":{key}"] = _narrow(first[None] if one else value)
    return entries, words


def _narrow(value: Tensor) -> Tensor:
    """The same numbers in the shortest type that has them all."""
    for kind in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        if value.to(kind).to(value.dtype).equal(value):
            return value.to(kind)
    return value


def _restored(parts: dict[str, Tensor], shape: torch.Size) -> Tensor:
    matrix = torch.Size((1, *shape) if len(shape) == 1 else (shape[0], shape[1:].numel()))
    kept = torch.ones(matrix, dtype=torch.bool)
    if "mask" in parts:
        kept = _unpacked(parts["mask"], torch.ones(matrix, dtype=torch.int64)).bool()
    if "values" in parts:
        return _placed(parts["values"], kept).reshape(shape)
    grid = _grid({key: value.float() for key, value in parts.items()})
    codes = _placed(_unpacked(parts["codes"], grid.widths(matrix)[kept]), kept)
    return grid.values(codes).where(kept, 0).reshape(shape)


def _grid(parts: dict[str, Tensor]) -> Grid:
    if "codebook" in parts:
        return Codebook(parts["codebook"])
    if "levels" in parts:
        return Spans(parts["low"], parts["high"], parts["levels"])
    return Affine(parts["scale"], parts["zero"], parts["bits"])


def _placed(values: Tensor, kept: Tensor) -> Tensor:
    """A matrix with values where they were kept and 0 elsewhere."""
    return torch.zeros(kept.shape, dtype=values.dtype).masked_scatter(kept, values)


def _packed(codes: Tensor, widths: Tensor) -> Tensor:
    """Whole numbers laid end to end, each in as many bits as its width, the lowest first."""
    places = torch.arange(int(widths.max()) if widths.numel() else 0)
    planes = (codes[..., None] >> places & 1).bool()
    return _bits(planes[places < widths[..., None]])


def _unpacked(packed: Tensor, widths: Tensor) -> Tensor:
    """What `_packed` made of numbers of these widths, int64 of the widths' shape."""
    places = torch.arange(int(widths.max()) if widths.numel() else 0)
    used = places < widths[..., None]
    found = np.unpackbits(packed.numpy(), count=int(used.sum()), bitorder="little")
    planes = _placed(torch.from_numpy(found).long(), used)
    return (planes << places).sum(-1)


def _bits(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.flatten().numpy(), bitorder="little"))


def _matrix(value: Tensor) -> Tensor:
    return value[None] if value.ndim == 1 else value.flatten(1)


def _on_cpu(grid: Grid) -> Grid:
    return type(grid)(**{key: torch.as_tensor(value).cpu() for key, value in vars(grid).items()})


def _spread(value: Tensor | int, shape: torch.Size) -> Tensor:
    """One number, or (rows or 1, groups of columns), over a matrix."""
    value = torch.as_tensor(value)
    if value.numel() == 1:
        return value.flatten().expand(shape)
    rows, columns = shape
    if value.ndim != 2 or len(value) not in (1, rows) or columns % value.shape[1]:
        raise ShapeError
    return value.repeat_interleave(columns // value.shape[1], 1).expand(shape)
