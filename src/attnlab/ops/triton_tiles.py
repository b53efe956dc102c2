"""What kernels in Triton's language share: loading tiles, and their products. Imports Triton, so only kernels import it."""
# Triton's decorator has no types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(
    x: tl.tensor, rows: tl.tensor, row_stride: int, columns: tl.tensor, column_stride: int, stop: int, width: int
) -> tl.tensor:
    """Entries of a matrix, zeros from row ``stop`` and column ``width`` on."""
    inside = (rows < stop)[:, None] & (columns < width)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def store_tile(
    x: tl.tensor, tile: tl.tensor, rows: tl.tensor, row_stride: int, columns: tl.tensor, column_stride: int, stop: int, width: int
) -> None:
    """Store the part of a tile before row ``stop`` and column ``width``, in the dtype of the memory."""
    inside = (rows < stop)[:, None] & (columns < width)[None, :]
    place = x + rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(place, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _dot(x: tl.tensor, y: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """The product of two tiles of one dtype."""
    if PRECISION == "widened":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:  # the compiler reads on after a return
        return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def dot(x: tl.tensor, y: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """The product of two tiles, with float32 sums; for ``PRECISION`` see `triton_launch.dot_precision`.

    Where one is float32 and the other of half precision, the first goes to the tensor cores as a sum of two such tiles, by
    which bfloat16 loses no more than 2^-16 of it.
    """
    if x.dtype == y.dtype:
        return _dot(x, y, PRECISION)
    elif x.dtype == tl.float32:
        high = x.to(y.dtype)
        return _dot(high, y, PRECISION) + _dot((x - high).to(y.dtype), y, PRECISION)
    else:
        high = y.to(x.dtype)
        return _dot(x, high, PRECISION) + _dot(x, (y - high).to(x.dtype), PRECISION)
