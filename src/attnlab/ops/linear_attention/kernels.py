r"""Kernels of causal linear attention, in Triton's language.

All serve one map of rows $a_i$ (n, d), $b_i$ (n, d), $c_i$ (n, e) and a state $S_0$ (d, e), per head,

$$o_i = s \sum_{j \le i} \lambda^{i-j} (a_i \cdot b_j)\, c_j + r \lambda^{i+1} S_0^\top a_i, \qquad
S_n = \lambda^n S_0 + w \sum_j \lambda^{n-1-j} b_j c_j^\top ,$$

or, ``REVERSE``, its mirror image that runs from the last token to the first. There a state is read before it decays, so that
the weights with which tokens read and write change places. The output and all gradients are this map: see `triton`.

A segment is some chunks in a row. `_local_states` sums what each segment writes, `_carry_states` turns these into the states at
the segments' starts, and `_walk` goes through every segment, chunk by chunk, from there. Sums run in float32.
"""
# A kernel's arguments are pointers, strides and sizes, which Triton's compiler types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from attnlab.ops.triton_tiles import dot, load_tile, store_tile

# exp of this is 0, and unlike exp(-inf * lag) it's 1, not NaN, at lag 0
LOWEST = tl.constexpr(-1e4)


@triton.jit
def _rate(log_decay, head, HAS_DECAY: tl.constexpr):
    """The logarithm of a head's decay."""
    rate = 0.0
    if HAS_DECAY:
        rate = tl.maximum(tl.load(log_decay + head).to(tl.float32), LOWEST)
    return rate


@triton.jit
def _lag(CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """How many steps before row r of a chunk row c comes."""
    index = tl.arange(0, CHUNK)
    lag = index[:, None] - index[None, :]
    return -lag if REVERSE else lag


@triton.jit
def _within(lag, rate):
    """What row r of a chunk reads of row c."""
    return tl.where(lag >= 0, tl.exp(rate * tl.maximum(lag, 0).to(tl.float32)), 0.0)


@triton.jit
def _read_weight(rate, count, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """What each row of a chunk with ``count`` tokens reads of the state before it."""
    index = tl.arange(0, CHUNK)
    return tl.exp(rate * (tl.maximum(count - 1 - index, 0) if REVERSE else index + 1).to(tl.float32))


@triton.jit
def _write_weight(rate, count, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """What is left of each row of a chunk with ``count`` tokens in the state after it."""
    return _read_weight(rate, count, CHUNK, not REVERSE)


@triton.jit
def _written(b, c, rate, count, CHUNK: tl.constexpr, REVERSE: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """What a chunk adds to the state."""
    if HAS_DECAY:
        return dot(tl.trans(b), c * _write_weight(rate, count, CHUNK, REVERSE)[:, None], PRECISION)
    else:
        return dot(tl.trans(b), c, PRECISION)


@triton.jit(do_not_specialize=["heads", "length", "segments", "span", "room", "w"])
def _local_states(
    b, c, log_decay, states,
    b_batch, b_head, b_row, c_batch, c_head, c_row,
    heads, length, segments, span, room, d, e, w,
    HAS_DECAY: tl.constexpr, REVERSE: tl.constexpr,
    CHUNK: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write to ``states`` (b h, room, d, e) the state after each segment, had it begun with zeros."""
    group, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    batch, head = (group // heads).to(tl.int64), group % heads
    tiles = tl.cdiv(e, BE)
    first = tl.program_id(1) // tiles * BD + tl.arange(0, BD)
    second = tl.program_id(1) % tiles * BE + tl.arange(0, BE)
    b += batch * b_batch + head.to(tl.int64) * b_head
    c += batch * c_batch + head.to(tl.int64) * c_head
    rate = _rate(log_decay, head, HAS_DECAY)
    start, stop = segment * span, tl.minimum(segment * span + span, length)
    chunks = tl.cdiv(stop - start, CHUNK)
    state = tl.zeros([BD, BE], tl.float32)
    for step in range(chunks):
        row = start + (chunks - 1 - step if REVERSE else step) * CHUNK
        rows, count = row + tl.arange(0, CHUNK), tl.minimum(stop - row, CHUNK)
        b_tile = load_tile(b, rows, b_row, first, 1, stop, d)
        c_tile = load_tile(c, rows, c_row, second, 1, stop, e)
        written = _written(b_tile, c_tile, rate, count, CHUNK, REVERSE, HAS_DECAY, PRECISION)
        state = state * tl.exp(rate * count) + written * w
    store_tile(states + (group.to(tl.int64) * room + segment) * d * e, state, first, e, second, 1, d, e)


@triton.jit(do_not_specialize=["heads", "length", "segments", "span", "room"])
def _carry_states(
    states, edge, log_decay,
    heads, length, segments, span, room, size,
    HAS_DECAY: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn each segment's own sum in ``states`` (b h, room, size) into the state before it; that of the first is ``edge``."""
    group = tl.program_id(0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rate = _rate(log_decay, group % heads, HAS_DECAY)
    state = tl.load(edge + group.to(tl.int64) * size + index, mask=index < size, other=0.0)
    for step in range(segments):
        segment = segments - 1 - step if REVERSE else step
        place = states + (group.to(tl.int64) * room + segment) * size + index
        own = tl.load(place, mask=index < size, other=0.0)
        tl.store(place, state, mask=index < size)
        state = state * tl.exp(rate * tl.minimum(span, length - segment * span)) + own


@triton.jit(do_not_specialize=["heads", "length", "segments", "span", "room", "s", "r", "w"])
def _walk(
    a, b, c, log_decay, states, out, last,
    a_batch, a_head, a_row, b_batch, b_head, b_row, c_batch, c_head, c_row, out_batch, out_head, out_row,
    first_stride, second_stride, heads, length, segments, span, room, d, e, s, r, w,
    HAS_DECAY: tl.constexpr, REVERSE: tl.constexpr, STORE_LAST: tl.constexpr,
    CHUNK: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the map's rows ``out`` (n, e), and with ``STORE_LAST`` its last state, from the states before the segments."""
    group, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    batch, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    first, second = tl.arange(0, BD), tl.program_id(1) * BE + tl.arange(0, BE)
    a += batch * a_batch + head * a_head
    b += batch * b_batch + head * b_head
    c += batch * c_batch + head * c_head
    out += batch * out_batch + head * out_head
    rate = _rate(log_decay, head, HAS_DECAY)
    start, stop = segment * span, tl.minimum(segment * span + span, length)
    chunks = tl.cdiv(stop - start, CHUNK)
    states += (group.to(tl.int64) * room + segment) * d * e
    state = load_tile(states, first, first_stride, second, second_stride, d, e)
    within = _within(_lag(CHUNK, REVERSE), rate) * s
    for step in range(chunks):
        row = start + (chunks - 1 - step if REVERSE else step) * CHUNK
        rows, count = row + tl.arange(0, CHUNK), tl.minimum(stop - row, CHUNK)
        a_tile = load_tile(a, rows, a_row, first, 1, stop, d)
        b_tile = load_tile(b, rows, b_row, first, 1, stop, d)
        c_tile = load_tile(c, rows, c_row, second, 1, stop, e)
        scores = dot(a_tile, tl.trans(b_tile), PRECISION) * within
        result = dot(a_tile, state, PRECISION) * (_read_weight(rate, count, CHUNK, REVERSE) * r)[:, None]
        result += dot(scores, c_tile, PRECISION)
        store_tile(out, result, rows, out_row, second, 1, stop, e)
        written = _written(b_tile, c_tile, rate, count, CHUNK, REVERSE, HAS_DECAY, PRECISION)
        state = state * tl.exp(rate * count) + written * w
    if STORE_LAST:  # noqa: SIM102  (a constant's branch, and one at run time)
        if segment == (0 if REVERSE else segments - 1):
            store_tile(last + group.to(tl.int64) * d * e, state, first, e, second, 1, d, e)


@triton.jit(do_not_specialize=["heads", "length", "segments", "span", "room", "grad_room", "s"])
def _decay_gradient(
    q, k, v, g, log_decay, states, grad_states, parts,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    heads, length, segments, span, room, grad_room, d, e, s,
    CHUNK: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write to ``parts`` (b h, segments, tiles) what every segment adds to the gradient of the decay's logarithm.

    A segment walks with its state S and $T = dS / d \\log \\lambda$, which starts from 0: how S at the start depends on the
    decay is the part of the segments before. ``states`` are before the segments, ``grad_states`` gradients of those after.
    """
    group, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    batch, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    index = tl.arange(0, CHUNK)
    first, second = tl.arange(0, BD), tl.program_id(1) * BE + tl.arange(0, BE)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    g += batch * g_batch + head * g_head
    rate = _rate(log_decay, head, True)
    start, stop = segment * span, tl.minimum(segment * span + span, length)
    state = load_tile(states + (group.to(tl.int64) * room + segment) * d * e, first, e, second, 1, d, e)
    slope = tl.zeros([BD, BE], tl.float32)
    lag = _lag(CHUNK, False)
    within = _within(lag, rate) * lag
    total = tl.zeros([CHUNK], tl.float32)
    for row in range(start, stop, CHUNK):
        rows, count = row + index, tl.minimum(stop - row, CHUNK)
        q_tile = load_tile(q, rows, q_row, first, 1, stop, d)
        k_tile = load_tile(k, rows, k_row, first, 1, stop, d)
        v_tile = load_tile(v, rows, v_row, second, 1, stop, e)
        g_tile = load_tile(g, rows, g_row, second, 1, stop, e)
        pairs = dot(q_tile, tl.trans(k_tile), PRECISION)
        pairs *= dot(g_tile, tl.trans(v_tile), PRECISION)
        total += tl.sum(pairs * within, axis=1)
        reach = dot(q_tile, slope, PRECISION) + dot(q_tile, state, PRECISION) * (index + 1)[:, None]
        total += tl.sum(reach * g_tile, axis=1) * _read_weight(rate, count, CHUNK, False)
        aged = v_tile * (tl.maximum(count - 1 - index, 0).to(tl.float32))[:, None]
        shrink = tl.exp(rate * count)
        slope = (slope + state * count) * shrink + _written(k_tile, aged, rate, count, CHUNK, False, True, PRECISION)
        state = state * shrink + _written(k_tile, v_tile, rate, count, CHUNK, False, True, PRECISION)
    after = load_tile(grad_states + (group.to(tl.int64) * grad_room + segment) * d * e, first, e, second, 1, d, e)
    result = tl.sum(total) * s + tl.sum(after * slope)
    tl.store(parts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), result)
