"""Kernels of tile attention in Triton's language: a program takes some queries of one tile past all keys of it."""
# A kernel's arguments are pointers, strides and sizes, which Triton's compiler types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from attnlab.ops.triton_tiles import dot


@triton.jit
def _gathered(
    x, places, row_stride, columns, width,
):  # fmt: skip
    """Rows of a matrix, zeros at -1 and from column ``width`` on."""
    inside = (places >= 0)[:, None] & (columns < width)[None, :]
    return tl.load(x + places[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _scores(
    q, k, query_places, key_places, rows, columns, bias, real, scale, x_size, y_size, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, ZERO_OUTSIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products and bias as powers of 2, -inf for pairs that are left out; ``bias`` and ``real`` are this tile's own."""
    scores = dot(q, tl.trans(k), PRECISION).to(tl.float32) * (scale * 1.4426950408889634)
    allowed = (columns < y_size)[None, :] & (rows < x_size)[:, None] & (query_places >= 0)[:, None]
    if HAS_BIAS:
        place = bias + rows[:, None] * y_size + columns[None, :]
        scores += tl.load(place, mask=allowed, other=float("-inf")).to(tl.float32) * 1.4426950408889634
    if not ZERO_OUTSIDE:
        allowed = allowed & (key_places >= 0)[None, :]
    if HAS_MASK:
        there = tl.load(real + key_places, mask=key_places >= 0, other=1)
        allowed = allowed & (there != 0)[None, :]
    if CAUSAL:
        allowed = allowed & (key_places[None, :] <= query_places[:, None])
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def _attend_tiles(
    q, k, v, queries, keys, bias, kind, real, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, queries_batch, queries_head, keys_batch, keys_head,
    bias_head, heads, group, tiles, x_size, y_size, num_keys, width, value_width, scale, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, ZERO_OUTSIDE: tl.constexpr, PRECISION: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Outputs (b h t, x, e) and natural log-sum-exps (b h t, x), by an online softmax over blocks of keys."""
    row = tl.program_id(0).to(tl.int64)
    tile, sequence = row % tiles, row // tiles
    example, head = sequence // heads, sequence % heads
    rows = tl.program_id(1) * BX + tl.arange(0, BX)
    ds, es = tl.arange(0, BD), tl.arange(0, BE)
    start = queries + example * queries_batch + head * queries_head + tile * x_size
    query_places = tl.load(start + rows, mask=rows < x_size, other=-1)
    q_tile = _gathered(q + example * q_batch + head * q_head, query_places, q_row, ds, width)
    k += example * k_batch + head // group * k_head
    v += example * v_batch + head // group * v_head
    keys += example * keys_batch + head * keys_head + tile * y_size
    if HAS_BIAS:
        bias += head * bias_head + tl.load(kind + tile) * (x_size * y_size)
    if HAS_MASK:
        real += example * num_keys
    top = tl.full([BX], float("-inf"), tl.float32)
    total = tl.zeros([BX], tl.float32)
    sums = tl.zeros([BX, BE], tl.float32)
    for first in range(0, y_size, BY):
        columns = first + tl.arange(0, BY)
        places = tl.load(keys + columns, mask=columns < y_size, other=-1)
        k_tile = _gathered(k, places, k_row, ds, width)
        scores = _scores(
            q_tile, k_tile, query_places, places, rows, columns, bias, real, scale, x_size, y_size,
            HAS_BIAS, HAS_MASK, CAUSAL, ZERO_OUTSIDE, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        values = _gathered(v, places, v_row, es, value_width)
        sums = sums * shrink[:, None] + dot(weights, values, PRECISION)
        top = higher
    some = total > 0
    inside = rows < x_size
    divisor = tl.where(some, total, 1.0)
    out += row * x_size * value_width + rows[:, None] * value_width + es[None, :]
    tl.store(out, (sums / divisor[:, None]).to(out.dtype.element_ty), mask=inside[:, None] & (es < value_width)[None, :])
    logarithm = tl.where(some, (top + tl.log2(divisor)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + row * x_size + rows, logarithm, mask=inside)


@triton.jit
def _differentiate_tiles(
    q, k, v, queries, keys, bias, kind, real, lse, inner, dout, dq, dk, dv, dbias,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, queries_batch, queries_head, keys_batch, keys_head,
    bias_head, heads, group, tiles, x_size, y_size, length, num_keys, width, value_width, scale,
    HAS_BIAS: tl.constexpr, TO_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, ZERO_OUTSIDE: tl.constexpr, PRECISION: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Add a tile's gradients to contiguous float32 memory; ``inner`` is the row sum of dout times out, less dlse."""
    row = tl.program_id(0).to(tl.int64)
    tile, sequence = row % tiles, row // tiles
    example, head = sequence // heads, sequence % heads
    rows = tl.program_id(1) * BX + tl.arange(0, BX)
    ds, es = tl.arange(0, BD), tl.arange(0, BE)
    inside = rows < x_size
    start = queries + example * queries_batch + head * queries_head + tile * x_size
    query_places = tl.load(start + rows, mask=inside, other=-1)
    q_tile = _gathered(q + example * q_batch + head * q_head, query_places, q_row, ds, width)
    kv_sequence = example * (heads // group) + head // group
    k += example * k_batch + head // group * k_head
    v += example * v_batch + head // group * v_head
    keys += example * keys_batch + head * keys_head + tile * y_size
    if HAS_BIAS:
        own = head * bias_head + tl.load(kind + tile) * (x_size * y_size)
        bias += own
        dbias += own
    if HAS_MASK:
        real += example * num_keys
    logarithm = tl.load(lse + row * x_size + rows, mask=inside, other=float("-inf")) * 1.4426950408889634
    # where there was no key the weights are 0
    logarithm = tl.where(logarithm == float("-inf"), float("inf"), logarithm)
    drop = tl.load(inner + row * x_size + rows, mask=inside, other=0.0)
    given_places = row * x_size * value_width + rows[:, None] * value_width + es[None, :]
    given = tl.load(dout + given_places, mask=inside[:, None] & (es < value_width)[None, :], other=0.0)
    to_q = tl.zeros([BX, BD], tl.float32)
    for first in range(0, y_size, BY):
        columns = first + tl.arange(0, BY)
        places = tl.load(keys + columns, mask=columns < y_size, other=-1)
        k_tile = _gathered(k, places, k_row, ds, width)
        scores = _scores(
            q_tile, k_tile, query_places, places, rows, columns, bias, real, scale, x_size, y_size,
            HAS_BIAS, HAS_MASK, CAUSAL, ZERO_OUTSIDE, PRECISION,
        )  # fmt: skip
        weights = tl.exp2(scores - logarithm[:, None])
        values = _gathered(v, places, v_row, es, value_width)
        held = (places >= 0)[:, None]
        target = (kv_sequence * num_keys + places)[:, None]
        to_v = dot(tl.trans(weights), given, PRECISION)
        tl.atomic_add(dv + target * value_width + es[None, :], to_v, mask=held & (es < value_width)[None, :])
        to_weights = dot(given, tl.trans(values), PRECISION)
        to_scores = weights * (to_weights - drop[:, None])
        if TO_BIAS:
            pair = dbias + rows[:, None] * y_size + columns[None, :]
            tl.atomic_add(pair, to_scores, mask=inside[:, None] & (columns < y_size)[None, :])
        to_k = dot(tl.trans(to_scores), q_tile, PRECISION) * scale
        tl.atomic_add(dk + target * width + ds[None, :], to_k, mask=held & (ds < width)[None, :])
        to_q += dot(to_scores, k_tile, PRECISION)
    target = (sequence * length + query_places)[:, None] * width + ds[None, :]
    tl.atomic_add(dq + target, to_q * scale, mask=(query_places >= 0)[:, None] & (ds < width)[None, :])
