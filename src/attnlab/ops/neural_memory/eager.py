r"""A neural memory in PyTorch, chunk by chunk, without the weights of any single token.

The gradient of a token's loss at the anchor is of rank one in every layer, $a_i^\top \delta_i$ for row vectors: $a$ enters the
layer, $\delta$ is the gradient of what leaves it. So with

$$M_t = A_t M + p_t S - \sum_{i \le t} G_{ti}\, \theta_i\, a_i^\top \delta_i$$

a layer reads $x M_t = A_t\, xM + p_t\, xS - \sum_{i \le t} (x \cdot a_i)\, G_{ti} \theta_i\, \delta_i$: three products for all
tokens of a chunk. M and S are memory and momentum before the chunk. Momentum and decay are two linear scans, the inverses E
and D of the bidiagonal $I - \mathrm{sub}(\eta)$ and $I - \mathrm{sub}(1 - \alpha)$ over the chunk with the state as a token
before it; $G = D E$, and A and p are what D and G make of that token.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import Segment, full_precision, segments
from attnlab.ops.neural_memory.alignment import Alignment
from attnlab.ops.neural_memory.memory import ACTIVATIONS, Activation, MemoryState, Weights

TILE = 1024
"""Tokens whose scans are computed together, at most."""

Renewals = list[bool | Bool[Tensor, "r 1 1"]]


class _Inputs(NamedTuple):
    """What a token brings: query, key, value; and alpha, eta, theta and 1, or four zeros where there is no token."""

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n e"]
    gates: Float[Tensor, "b h n 4"]


class _Scans(NamedTuple):
    """The scans of a chunk; the names are those of the module's equation."""

    keep: Float[Tensor, "r c 1"]  # A
    carry: Float[Tensor, "r c 1"]  # p
    mix: Float[Tensor, "r c c"]  # G theta
    fade: Float[Tensor, "r 1 1"]  # what the chunk leaves of S in the momentum
    steps: Float[Tensor, "r c 1"]  # what each gradient adds to the momentum after the chunk


@full_precision
def neural_memory(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    alpha: Float[Tensor, "b h n"],
    eta: Float[Tensor, "b h n"],
    theta: Float[Tensor, "b h n"],
    state: MemoryState,
    *,
    chunk: int,
    activation: str,
    mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n e"], MemoryState]:
    """What `attnlab.ops.neural_memory` documents; time and memory linear in n, in both directions."""
    dtype, (_, h, n, _), place = v.dtype, q.shape, state.place
    gates = torch.stack((alpha, eta, theta, torch.ones_like(alpha)), -1)
    if mask is not None:
        gates = gates * mask[:, None, :, None].to(gates.dtype)
    inputs = _Inputs(*(x.to(accumulate_dtype(dtype)) for x in (q, k, v, gates)))
    aligned = None
    after = place if chunk == 1 else (place + (n if mask is None else mask.sum(1))) % chunk
    if chunk == 1 or (isinstance(place, int) and mask is None):
        plan, renew = _plan(n, chunk, place if isinstance(place, int) else 0)
    else:
        start = q.new_full(q.shape[:1], place, dtype=torch.int64) if isinstance(place, int) else place
        aligned = Alignment.of(start, mask, n, chunk)
        plan, renew = _aligned_plan(aligned, n, chunk, h)
        if n > 1:
            inputs = _Inputs(*(aligned.spread(x) for x in inputs))
    y, memory, momentum, anchor = _run(inputs, state, plan, renew, ACTIVATIONS[activation])
    if aligned is not None and n > 1:
        y = aligned.collect(y)
    return y.to(dtype), MemoryState(memory, momentum, anchor, after)


def _plan(n: int, chunk: int, place: int) -> tuple[list[Segment], Renewals]:
    """Tiles of chunks where the first continues one that has ``place`` tokens, and where gradients are taken anew."""
    first = min(chunk - place, n) if place else 0
    head = [Segment(0, first, first)] if first else []
    tail = segments(n - first, chunk, max(TILE // chunk, 1)) if n > first else []
    plan = head + [Segment(start + first, stop + first, size) for start, stop, size in tail]
    renew: Renewals = [True] * sum((stop - start) // size for start, stop, size in plan)
    return plan, ([False, *renew[1:]] if first else renew)


def _aligned_plan(aligned: Alignment, n: int, chunk: int, heads: int) -> tuple[list[Segment], Renewals]:
    """The same where every example has its own place; a single token has no slots around it."""
    ends = aligned.place + aligned.count
    first = (aligned.place == 0) & (aligned.count > 0)
    turns = [first] if n == 1 else [first, *(ends > start for start in range(chunk, aligned.length, chunk))]
    renew: Renewals = [turn.repeat_interleave(heads)[:, None, None] for turn in turns]
    return ([Segment(0, 1, 1)] if n == 1 else segments(aligned.length, chunk, max(TILE // chunk, 1))), renew


def _run(
    inputs: _Inputs, state: MemoryState, plan: list[Segment], renew: Renewals, function: Activation
) -> tuple[Float[Tensor, "b h n e"], Weights, Weights, Weights]:
    """All chunks, and memory, momentum and anchor after the last."""
    memory, momentum, anchor = ([w.flatten(0, 1) for w in group] for group in state[:3])
    lengths = [segment.stop - segment.start for segment in plan]
    tiles = zip(plan, *(x.flatten(0, 1).split(lengths, 1) for x in inputs), strict=True)
    outputs, renewals = [], iter(renew)
    for segment, *tile in tiles:
        chunks = [x.unflatten(1, (-1, segment.size)) for x in tile]
        count = chunks[0].shape[1]
        each = zip(*(x.unbind(1) for x in chunks[:3]), _scans(chunks[3]), islice(renewals, count), strict=True)
        for q_c, k_c, v_c, scans, turn in each:
            if turn is True:
                anchor = memory
            elif turn is not False:
                anchor = [torch.where(turn, now, old) for now, old in zip(memory, anchor, strict=True)]
            y, memory, momentum = _chunk(q_c, k_c, v_c, scans, memory, momentum, anchor, function)
            outputs.append(y)
    rows = inputs.q.shape[:2]
    after = (tuple(w.unflatten(0, rows) for w in group) for group in (memory, momentum, anchor))
    return torch.cat(outputs, 1).unflatten(0, rows), *after


def _scans(gates: Float[Tensor, "r chunks c 4"]) -> list[_Scans]:
    """The scans of every chunk of a tile."""
    alpha, eta, theta, there = gates.unbind(-1)
    if alpha.shape[-1] == 1:
        keep, carry = 1.0 - alpha, eta * there  # one token: the scans are the gates themselves
        parts = keep[..., None], carry[..., None], (theta * there)[..., None], (eta + 1.0 - there)[..., None], theta[..., None]
        return [_Scans(*one) for one in zip(*(x.unbind(1) for x in parts), strict=True)]
    size = alpha.shape[-1] + 1
    one = torch.eye(size, dtype=gates.dtype, device=gates.device)
    echo = _unit_lower(eta + (1.0 - there), one)  # E
    # The token before the chunk brings the state itself: its momentum is not added to M once more.
    rows = torch.cat((torch.zeros_like(there[..., :1]), there), -1).unsqueeze(-1)
    both = _unit_lower(1.0 - alpha, torch.cat((rows * echo, one[:, :1].expand(*echo.shape[:-1], 1)), -1))
    theta = theta.unsqueeze(-2)
    parts = (
        both[..., 1:, -1:],
        both[..., 1:, :1],
        both[..., 1:, 1:-1] * theta,
        echo[..., -1:, :1],
        (echo[..., -1:, 1:] * theta).mT,
    )
    return [_Scans(*one) for one in zip(*(x.unbind(1) for x in parts), strict=True)]


def _unit_lower(factor: Float[Tensor, "r chunks c"], right: Tensor) -> Float[Tensor, "r chunks c1 _"]:
    """The scan ``x_t = factor_t x_{t-1} + right_t`` from the row 0 of ``right`` on."""
    index = torch.arange(factor.shape[-1] + 1, device=factor.device)
    below = (index[:, None] == index + 1).to(factor.dtype)
    system = F.pad(-factor, (1, 0)).unsqueeze(-1) * below
    return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


def _chunk(
    q: Float[Tensor, "r c d"],
    k: Float[Tensor, "r c d"],
    v: Float[Tensor, "r c e"],
    scans: _Scans,
    memory: list[Tensor],
    momentum: list[Tensor],
    anchor: list[Tensor],
    function: Activation,
) -> tuple[Float[Tensor, "r c e"], list[Tensor], list[Tensor]]:
    """What the tokens of a chunk read, and memory and momentum after it."""
    inputs, deltas = _gradients(k, v, anchor, function)
    last = scans.mix[:, -1:].mT
    keep, carry = scans.keep[:, -1:], scans.carry[:, -1:]
    x, memories, momenta = q, [], []
    for layer, (a, delta, m, s) in enumerate(zip(inputs, deltas, memory, momentum, strict=True)):
        if layer:
            x = function.value(x)
        x = scans.keep * (x @ m) + scans.carry * (x @ s) - ((x @ a.mT) * scans.mix) @ delta
        memories.append(keep * m + carry * s - (a * last).mT @ delta)
        momenta.append(scans.fade * s - (a * scans.steps).mT @ delta)
    return x, memories, momenta


def _gradients(
    k: Float[Tensor, "r c d"], v: Float[Tensor, "r c e"], anchor: list[Tensor], function: Activation
) -> tuple[list[Tensor], list[Tensor]]:
    """For every layer what enters it, and the gradient of the squared errors for what leaves it."""
    inputs, slopes = [k], []
    for weight in anchor[:-1]:
        z = inputs[-1] @ weight
        inputs.append(function.value(z))
        slopes.append(function.slope(z))
    deltas = [2.0 * (inputs[-1] @ anchor[-1] - v)]
    for weight, slope in zip(reversed(anchor[1:]), reversed(slopes), strict=True):
        deltas.append((deltas[-1] @ weight.mT) * slope)
    return inputs, deltas[::-1]
