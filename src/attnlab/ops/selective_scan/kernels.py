r"""Kernels of the selective scan, in Triton's language.

Forward, a state (s states, channels) goes through the tokens, $h_t = a_t h_{t-1} + B_t x_t$ with $a_t = e^{\mathrm{dt}_t A}$.
Backward, ``REVERSE``, what the tokens from t on hand back to the state before them does: $m_t = a_t (m_{t+1} + C_t\,dy_t)$.
`_walk` does either through segments of tokens, from zeros to learn what a segment adds, which `_carry` turns into the
states before the segments, and then from these. It leaves the state at every ``CHUNK`` tokens, from where `_gradients` computes
a chunk's states once more, in registers, all chunks at once.

A token beyond the end has the step 0 and the input 0, which leaves a state as it is. Tensors of states have channels last.
"""
# A kernel's arguments are pointers, strides and sizes, which Triton's compiler types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _channels(blocks, width, BLOCK: tl.constexpr):
    """The channels of this program's block, their places in their group, real below ``width``, and the group."""
    group, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    within = block * BLOCK + tl.arange(0, BLOCK)
    return group * width + within, within, group


@triton.jit(do_not_specialize=["length", "segments", "span", "room", "blocks"])
def _walk(
    x, dt, rates, weights, readers, edges, y, kept, ends, steps,
    x_batch, x_row, dt_batch, dt_row, weights_batch, weights_row, weights_group, readers_batch, readers_row, readers_group,
    length, segments, span, room, channels, blocks, width,
    REVERSE: tl.constexpr, LOCAL: tl.constexpr, READ: tl.constexpr, KEEP: tl.constexpr,
    CONSTANT_WEIGHTS: tl.constexpr, CONSTANT_READERS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Take a segment's state to its other end, stored in ``ends`` (b segments s e).

    ``LOCAL``: from zeros, and sum the steps into ``steps`` (b segments e); otherwise from ``edges`` (b segments s e).
    ``READ``: store what ``readers`` read of the states in ``y``. ``KEEP``: store in ``kept`` (b room s e) the state with which
    each chunk begins. ``ROOM`` is ``STATES`` or the next power of two.
    """
    batch, segment = (tl.program_id(0) // segments).to(tl.int64), tl.program_id(0) % segments
    channel, within, group = _channels(blocks, width, BLOCK)
    index = tl.arange(0, ROOM)
    inside = (index < STATES)[:, None] & (within < width)[None, :]
    place = index[:, None] * channels + channel[None, :]
    rate = tl.load(rates + place, mask=inside, other=0.0) * LOG2_E
    edge = tl.program_id(0).to(tl.int64) * STATES * channels
    state = tl.zeros([ROOM, BLOCK], tl.float32)
    if not LOCAL:
        state = tl.load(edges + edge + place, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    if CONSTANT_WEIGHTS:
        weight = tl.load(weights + place, mask=inside, other=0.0)
    if READ and CONSTANT_READERS:
        reader = tl.load(readers + place, mask=inside, other=0.0)
    start, stop = segment * span, tl.minimum(segment * span + span, length)
    count = tl.cdiv(stop - start, CHUNK)
    x += batch * x_batch
    dt += batch * dt_batch
    weights += batch * weights_batch + group * weights_group
    if READ:
        readers += batch * readers_batch + group * readers_group
    for step in range(count):
        row = start + (count - 1 - step if REVERSE else step) * CHUNK
        if KEEP:
            tl.store(kept + (batch * room + row // CHUNK) * STATES * channels + place, state, mask=inside)
        for offset in tl.static_range(CHUNK):
            token = row + (CHUNK - 1 - offset if REVERSE else offset)
            # A width of 0 for a token that isn't there: the interpreter takes no conjunction of a scalar with a vector.
            there = within < tl.where(token < stop, width, 0)
            near = tl.minimum(token, stop - 1).to(tl.int64)
            input_row = tl.load(x + near * x_row + channel, mask=there, other=0.0)
            step_row = tl.load(dt + near * dt_row + channel, mask=there, other=0.0)
            decay = tl.exp2(step_row[None, :] * rate)
            if not CONSTANT_WEIGHTS:
                weight = tl.load(weights + near * weights_row + index, mask=index < STATES, other=0.0)[:, None]
            state = decay * (state + weight * input_row[None, :]) if REVERSE else decay * state + weight * input_row[None, :]
            if LOCAL:
                total += step_row
            if READ:
                if not CONSTANT_READERS:
                    reader = tl.load(readers + near * readers_row + index, mask=index < STATES, other=0.0)[:, None]
                tl.store(y + (batch * length + near) * channels + channel, tl.sum(state * reader, axis=0), mask=there)
    tl.store(ends + edge + place, state, mask=inside)
    if LOCAL:
        tl.store(steps + tl.program_id(0).to(tl.int64) * channels + channel, total, mask=within < width)


@triton.jit(do_not_specialize=["segments"])
def _carry(
    edges, steps, rates, first, segments, channels, size,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn what each segment adds, in ``edges`` (b segments s e), into the state it begins with, the first with ``first``."""
    batch = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    rate = tl.load(rates + index, mask=inside, other=0.0)
    state = tl.load(first + batch * size + index, mask=inside, other=0.0)
    for step in range(segments):
        segment = batch * segments + (segments - 1 - step if REVERSE else step)
        own = tl.load(edges + segment * size + index, mask=inside, other=0.0)
        total = tl.load(steps + segment * channels + index % channels, mask=inside, other=0.0)
        tl.store(edges + segment * size + index, state, mask=inside)
        state = tl.exp(total * rate) * state + own


@triton.jit
def _rows(x, row, stride, channel, within, width, length, CHUNK: tl.constexpr):
    """The rows of a chunk's tokens, zeros beyond the end."""
    rows = ()
    for index in tl.static_range(CHUNK):
        inside = within < tl.where(row + index < length, width, 0)
        rows = rows + (tl.load(x + (row + index).to(tl.int64) * stride + channel, mask=inside, other=0.0),)  # noqa: RUF005
    return rows


@triton.jit
def _store_rows(x, rows, row, stride, channel, within, width, length, CHUNK: tl.constexpr):
    """Store a chunk's rows, those of tokens beyond the end excepted."""
    for index in tl.static_range(CHUNK):
        inside = within < tl.where(row + index < length, width, 0)
        tl.store(x + (row + index).to(tl.int64) * stride + channel, rows[index], mask=inside)


@triton.jit
def _weights_of(
    weights, batch, row, strides, group, state, channel, channels, valid, left, CONSTANT: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """One state's weight for each of a chunk's tokens, of which there are ``left``: a number, or a row where constant."""
    found = ()
    if CONSTANT:
        row_of_all = tl.load(weights + state * channels + channel, mask=valid, other=0.0)
        for _ in tl.static_range(CHUNK):
            found = found + (row_of_all,)  # noqa: RUF005
    else:
        batch_stride, row_stride, group_stride = strides
        weights += batch * batch_stride + row.to(tl.int64) * row_stride + group * group_stride + state
        for index in tl.static_range(CHUNK):  # those beyond the end meet inputs of 0
            found = found + (tl.load(weights + tl.minimum(index, left - 1) * row_stride),)  # noqa: RUF005
    return found


@triton.jit
def _emit(products, parts, numbers, line, valid, CONSTANT: tl.constexpr, CHUNK: tl.constexpr, STATES: tl.constexpr):
    """Store a chunk's part of the gradient of one state's weights: a number a token, or summed to a row where constant."""
    if CONSTANT:
        summed = products[0]
        for index in tl.static_range(1, CHUNK):
            summed += products[index]
        tl.store(parts + line, summed, mask=valid)
    else:
        for index in tl.static_range(CHUNK):
            tl.store(parts + numbers + index * STATES, tl.sum(products[index]))


@triton.jit(do_not_specialize=["length", "chunks", "room", "blocks"])
def _gradients(
    x, dt, dy, rates, weights, readers, starts, ends, dx, ddt, dweights, dreaders,
    x_batch, x_row, dt_batch, dt_row, dy_batch, dy_row,
    weights_batch, weights_row, weights_group, readers_batch, readers_row, readers_group,
    length, chunks, room, channels, blocks, width,
    CONSTANT_WEIGHTS: tl.constexpr, CONSTANT_READERS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's inputs and steps, and its part of those of the rates, which takes the place of ``ends``.

    ``starts`` (b room s e) are the states before the chunks, ``ends`` (b chunks s e) what comes back to those after. Parts of
    the gradients of the weights and readers go to (b g blocks tokens s), with room for whole chunks, or (b chunks s e).
    """
    batch, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    channel, within, group = _channels(blocks, width, BLOCK)
    valid, row, left = within < width, chunk * CHUNK, length - chunk * CHUNK
    xs = _rows(x + batch * x_batch, row, x_row, channel, within, width, length, CHUNK)
    dts = _rows(dt + batch * dt_batch, row, dt_row, channel, within, width, length, CHUNK)
    dys = _rows(dy + batch * dy_batch, row, dy_row, channel, within, width, length, CHUNK)
    dxs, ddts = (), ()
    for _ in tl.static_range(CHUNK):
        dxs, ddts = dxs + (tl.zeros([BLOCK], tl.float32),), ddts + (tl.zeros([BLOCK], tl.float32),)  # noqa: RUF005
    strides = (weights_batch, weights_row, weights_group), (readers_batch, readers_row, readers_group)
    for state in range(STATES):
        line = (tl.program_id(0).to(tl.int64) * STATES + state) * channels + channel
        numbers = ((batch * tl.num_programs(1) + tl.program_id(1)) * chunks + chunk) * CHUNK * STATES + state
        rate = tl.load(rates + state * channels + channel, mask=valid, other=0.0)
        h = tl.load(starts + ((batch * room + chunk) * STATES + state) * channels + channel, mask=valid, other=0.0)
        m = tl.load(ends + line, mask=valid, other=0.0)
        bs = _weights_of(weights, batch, row, strides[0], group, state, channel, channels, valid, left, CONSTANT_WEIGHTS, CHUNK)
        cs = _weights_of(readers, batch, row, strides[1], group, state, channel, channels, valid, left, CONSTANT_READERS, CHUNK)
        befores, decays, products = (), (), ()
        for index in tl.static_range(CHUNK):
            befores, decays = befores + (h,), decays + (tl.exp2(dts[index] * (rate * LOG2_E)),)  # noqa: RUF005
            h = decays[index] * h + xs[index] * bs[index]
            products = products + (h * dys[index],)  # noqa: RUF005
        _emit(products, dreaders, numbers, line, valid, CONSTANT_READERS, CHUNK, STATES)
        new_dxs, new_ddts, products, drate = (), (), (), tl.zeros([BLOCK], tl.float32)
        for index in tl.static_range(CHUNK - 1, -1, -1):
            adjoint = m + cs[index] * dys[index]
            m = decays[index] * adjoint
            exponent = m * befores[index]
            drate += exponent * dts[index]
            products = (adjoint * xs[index],) + products  # noqa: RUF005
            new_dxs = (dxs[index] + adjoint * bs[index],) + new_dxs  # noqa: RUF005
            new_ddts = (ddts[index] + exponent * rate,) + new_ddts  # noqa: RUF005
        _emit(products, dweights, numbers, line, valid, CONSTANT_WEIGHTS, CHUNK, STATES)
        dxs, ddts = new_dxs, new_ddts
        tl.store(ends + line, drate, mask=valid)
    first = batch * length * channels
    _store_rows(dx + first, dxs, row, channels, channel, within, width, length, CHUNK)
    _store_rows(ddt + first, ddts, row, channels, channel, within, width, length, CHUNK)
