"""A comparison as the kernels take it: both sides, who is similar to whom, and the settings."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nearfar.engine.closeness import Closeness, CosineDistance, Euclidean
from nearfar.engine.gpu.kernels.tile import Side
from nearfar.engine.gpu.language import launch
from nearfar.engine.gpu.shapes import Shape, processors, shape_of
from nearfar.engine.relation import Relation
from nearfar.engine.step import Request
from nearfar.engine.together import Together

# Rows of up to so many numbers are short: in 16 bits they stay on the chip. Longer ones, and those
# of float32, are taken in chunks of _CHUNK.
SHORT, _CHUNK = 256, 128
# Bytes of a row that a tile's product takes at a time, and of which rows are a multiple in memory.
_STEP, _ALIGNED = 128, 16
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# How float32 is multiplied: three products of tensor cores are as exact as one of float32.
_PRODUCTS = {"tf32": "tf32", "float32": "tf32x3"}
# At most so many parts of the columns have sums of their own.
_MOST_PARTS = 16
_BITS = 32


@dataclass(eq=False)
class Grid:
    """How a kernel is spread over the device: blocks of rows, parts of the columns, chunks.

    Attributes:
        shape: of a tile.
        blocks: of rows.
        split: how many columns a part has.
        parts: how many parts there are.
        grid: of the launch.
    """

    shape: Shape
    blocks: int
    split: int
    parts: int
    grid: tuple[int, int, int]


class Comparison:
    """Rows and columns of a request, prepared for the kernels.

    Args:
        request: what is asked.
        closeness: how close rows are to columns.
        relation: which pairs are similar.
        wide: whether the products of tiles are made from blocks of rows, whatever their length.

    Attributes:
        rows, columns: the two sides; the same where the rows meet each other.
        d: how many numbers a row has.
        dtype: of the rows as they are multiplied.
        measure: how close they are: the closeness's own name in the kernels, or "halved", half the
            squared distance.
        chunk, width: how many numbers of a row are taken at a time, and how many it has in memory.
        words: of a row's multi-labels, 32 labels each; 0: none.
        settings: of every kernel.
    """

    def __init__(
        self, request: Request, closeness: Closeness, relation: Relation, *, wide: bool = False
    ) -> None:
        a, b = request.prepared(closeness)
        self.request, self.relation, self.d = request, relation, a.shape[1]
        self.wide = wide
        self.dtype = _DTYPES.get(request.precision, torch.float32)
        self.measure = closeness.kernel
        if self.measure == "cosine" and request.precision != "float32":
            self.measure = "halved"  # the square, since rounded rows are not of unit length
        self.chunk, self.width = self._chunk_and_width(wide=wide)
        down = None if self.measure in ("product", "cosine") else _down(a, b)
        if down is not None:
            a, b = a * down, None if b is None else b * down
        self.words = 0
        self.rows = self._side(a, down, relation.row_labels, is_rows=True)
        self.columns = self.rows
        if b is not None:
            self.columns = self._side(b, down, relation.column_labels, is_rows=False)
        self.settings: dict[str, Any] = {
            "LABELS": self._labels,
            "SELVES": self._selves,
            "MEASURE": self.measure,
            "CANCELS": _cancels(self.measure),
            "PRODUCT": _PRODUCTS.get(request.precision, "ieee"),
            "WIDTH": self.width,
            "CHUNK": self.chunk,
        }

    def _chunk_and_width(self, *, wide: bool) -> tuple[int, int]:
        """How many numbers of a row are taken at a time, and how many it has in memory."""
        width, size = self.d, self.dtype.itemsize
        if wide:
            return _STEP // size, _up(width, _ALIGNED // size)
        whole = SHORT if size == 2 else _CHUNK
        chunk = max(16, 1 << (width - 1).bit_length()) if width <= whole else _CHUNK
        return chunk, _up(width, chunk)

    @property
    def mirrored(self) -> bool:
        """Whether the columns are the rows."""
        return self.columns is self.rows

    @property
    def spread(self) -> Together | None:
        """The processes whose rows the columns are, those of `rows` among them; else None.

        Then the pull of a pair on its row is known from both ends, once what is known of the
        anchors has been exchanged, and columns need no gradient.
        """
        met = self.relation.first is not None and self.relation.declared is not None
        return self.request.together if met else None

    @property
    def _selves(self) -> str:
        declared = self.relation.declared is not None
        if self.relation.symmetric or (declared and self.relation.first is not None):
            return "diagonal"
        return "named" if declared else "none"

    @cached_property
    def _labels(self) -> str:
        if self.relation.match is not None and self.relation.first is None:
            return "match"
        if self.relation.row_labels is None:
            return "diagonal"
        return "classes" if self.relation.row_labels.ndim == 1 else "bits"

    def _side(
        self, x: Tensor, down: Tensor | None, labels: Tensor | None, *, is_rows: bool
    ) -> Side:
        if labels is not None and labels.ndim == 2:
            labels = _words(labels)
            self.words = labels.shape[1]
        x = x.contiguous()
        exact = None if self.measure == "product" else x
        distance = self.measure not in ("product", "cosine")
        relation = self.relation
        return Side(
            self._operand(x),
            exact,
            torch.linalg.vecdot(x, x) if distance else None,
            _contiguous(labels),
            _contiguous(relation.match) if is_rows else None,
            _contiguous(relation.declared) if is_rows else None,
            down,
            x.shape[0],
            (self.relation.first or 0) if is_rows else 0,
        )

    def _operand(self, x: Tensor) -> Tensor:
        """The rows in the dtype of the products, with zeros up to the width of the kernels."""
        if x.dtype is self.dtype and x.shape[1] == self.width:
            return x
        padded = x.new_zeros(x.shape[0], self.width, dtype=self.dtype)
        padded[:, : x.shape[1]] = x
        return padded

    def grid(self, kernel: str, own: Side, other: Side, chunks: int = 1) -> Grid:
        """How a kernel is spread over the device, `own` being the rows that its programs own."""
        where = own.operand.device
        if kernel == "pull" and self.measure != "product":
            kernel = "pull distances"
        shape = shape_of(kernel, self.dtype, self.chunk, where, self.request.limits)
        blocks = -(-own.count // shape.rows)
        tiles = -(-other.count // shape.columns)
        wanted = -(-2 * processors(where) // max(blocks * chunks, 1))
        each = -(-tiles // max(1, min(wanted, tiles, _MOST_PARTS)))
        parts = max(1, -(-tiles // max(each, 1)))
        split = max(each, 1) * shape.columns
        return Grid(shape, blocks, split, parts, (blocks, parts, chunks))

    def tiles(self, kernel: str, own: Side, *, at_once: bool = False) -> Grid:
        """How a kernel is spread over tiles of some rows and all columns.

        Args:
            kernel: see `shape_of`.
            own: the rows.
            at_once: whether each tile has a program; else each processor has one.
        """
        where = own.operand.device
        shape = shape_of(kernel, self.dtype, self.chunk, where, self.request.limits)
        blocks, parts = -(-own.count // shape.rows), -(-self.columns.count // shape.columns)
        tiles = blocks * parts
        programs = tiles if at_once else min(tiles, processors(where))
        return Grid(shape, blocks, shape.columns, parts, (programs, 1, 1))

    def whole_grid(self, kernel: str, own: Side, chunks: int = 1) -> Grid:
        """The same for a kernel whose programs see all columns."""
        where = own.operand.device
        shape = shape_of(kernel, self.dtype, self.chunk, where, self.request.limits)
        blocks = -(-own.count // shape.rows)
        return Grid(shape, blocks, 0, 1, (blocks, 1, chunks))

    def scale_sums(self, own: Side | None = None, parts: int = _MOST_PARTS) -> Tensor | None:
        """Room for the sums of forces times closeness of each part; None: they are not wanted.

        Args:
            own: the rows that have sums; None: all.
            parts: of the columns.
        """
        if not self.request.learns_scale or self.measure != "product":
            return None
        own = self.rows if own is None else own
        like: Tensor = own.operand
        return like.new_zeros(parts, own.count, dtype=torch.float32)

    def launch(self, kernel: Any, grid: Grid, *arguments: Any, **settings: Any) -> None:
        """Run a kernel, with those settings that it takes, unless there is nothing to do."""
        if not grid.grid[0]:
            return
        usual = {k: v for k, v in self.settings.items() if k in kernel.arg_names}
        # Triton runs on the device in use, which need not be that of the rows.
        with torch.cuda.device_of(self.rows.operand):  # type: ignore[no-untyped-call]
            launch(kernel, grid.grid, grid.shape, arguments, {**usual, **settings})


def part_of(side: Side, at: slice) -> Side:
    """Some rows of a side."""
    cut = {
        name: None if values is None else values[at]
        for name, values in side._asdict().items()
        if name not in ("down", "count", "first")
    }
    return side._replace(**cut, count=at.stop - at.start, first=side.first + at.start)


def _up(size: int, step: int) -> int:
    """The smallest multiple of a step that is not below a size."""
    return -(-size // step) * step


def _cancels(measure: str | None) -> float:
    """Below which share of its terms a distance loses its digits."""
    if measure == "product":
        return 0.0
    return CosineDistance.CANCELS if measure == "cosine" else Euclidean.CANCELS


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _words(labels: Tensor) -> Tensor:
    """(n, w) int32, 32 labels a word, from (n, c) bool."""
    n, c = labels.shape
    size = -(-max(c, 1) // _BITS)
    padded = labels.new_zeros(n, size * _BITS)
    padded[:, :c] = labels
    bits = padded.view(n, size, _BITS)
    words = torch.zeros(bits.shape[:2], dtype=torch.int32, device=labels.device)
    for k in range(_BITS):  # all at once would take 64 bits a label
        words |= bits[:, :, k].to(torch.int32) << k
    return words


def _down(a: Tensor, b: Tensor | None) -> Tensor:
    """A power of two that makes the rows so short that their squares are finite; 1 if they are."""
    largest = a.abs().amax() if a.numel() else a.new_zeros(())
    if b is not None and b.numel():
        largest = torch.maximum(largest, b.abs().amax())
    most = 2.0**40  # its square times the longest row is finite
    exponent = (largest / most).clamp(min=1).nan_to_num(1.0).log2().ceil()
    return torch.ldexp(torch.ones_like(largest), -exponent)
