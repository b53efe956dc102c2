"""Law 4: piece by piece is the same as at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.checking.bench import Bench, Inputs, gradients_of
from attnlab.checking.draw import MASKS
from attnlab.checking.require import FORWARD, require, require_close, require_gradients, require_zero
from attnlab.checking.suite import conformance
from attnlab.core.contract import Mixer
from attnlab.core.state import State


def stream(
    mixer: Mixer, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, pieces: Sequence[int], state: State | None = None
) -> tuple[Float[Tensor, "b n c"], State]:
    """Outputs and last state of ``extend`` over consecutive pieces, from ``state`` or from the beginning."""
    state = mixer.init_state(x.shape[0]) if state is None else state
    outputs, start = [], 0
    for length in pieces:
        part = slice(start, start + length)
        y, state = mixer.extend(x[:, part], state, mask=None if mask is None else mask[:, part])
        outputs.append(y)
        start += length
    return torch.cat(outputs, dim=1), state


def _splits(bench: Bench, n: int) -> list[list[int]]:
    return [[n], [1] * n, [n - 1, 1], *(bench.draw.split(n) for _ in range(bench.profile.splits))]


@conformance(law=4, promise="streaming")
def streaming_splits(bench: Bench) -> str:
    """Any split of a sequence, one token at a time too, has the outputs of the whole."""
    for trial in bench.trials(causal=True, ranks=(1,)):
        x = trial.inputs.x
        with torch.no_grad():
            whole = trial.inputs.apply(trial.mixer)
            for pieces in _splits(bench, x.shape[1]):
                y, _ = stream(trial.mixer, x, None, pieces)
                require_close(f"{trial}, in pieces of {pieces}", y, whole, FORWARD)
    return bench.said()


@conformance(law=4, promise="streaming", when=lambda supports: supports.streaming and supports.mask)
def streaming_padding(bench: Bench) -> str:
    """Any split of a sequence with masked tokens anywhere has the outputs of the whole, exactly 0 at masked tokens."""
    for trial in bench.trials(causal=True, ranks=(1,)):
        x = trial.inputs.x
        for kind in MASKS:
            mask = bench.draw.mask(kind, *x.shape[:2])
            poisoned = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
            with torch.no_grad():
                whole = replace(trial.inputs, mask=mask).apply(trial.mixer)
                for pieces in _splits(bench, x.shape[1]):
                    y, _ = stream(trial.mixer, poisoned, mask, pieces)
                    said = f"{trial}, masked on the {kind}, in pieces of {pieces}"
                    require_close(said, y, whole, FORWARD)
                    require_zero(f"{said}: the output at masked tokens", y[~mask])
    return bench.said()


@conformance(law=4, promise="streaming", when=lambda supports: supports.streaming and supports.mask)
def streaming_mask_begins_late(bench: Bench) -> str:
    """A mask that is given for some pieces alone means ones for the others."""
    for trial in bench.trials(causal=True, ranks=(1,)):
        x = trial.inputs.x
        batch, n = x.shape[:2]
        first, last = bench.draw.integer(1, n - 2), 1
        middle = bench.draw.mask("inside", batch, n - first - last)
        mask = torch.cat([middle.new_ones(batch, first), middle, middle.new_ones(batch, last)], dim=1)
        with torch.no_grad():
            whole = replace(trial.inputs, mask=mask).apply(trial.mixer)
            y1, state = stream(trial.mixer, x[:, :first], None, [first])
            y2, state = stream(trial.mixer, x[:, first : n - last], middle, [n - first - last], state)
            y3, _ = stream(trial.mixer, x[:, n - last :], None, [last], state)
        require_close(f"{trial}, only the middle piece with a mask", torch.cat([y1, y2, y3], dim=1), whole, FORWARD)
    return bench.said()


@conformance(law=4, promise="streaming")
def streaming_gradient(bench: Bench) -> str:
    """Gradients flow through the state: they are those of the whole."""
    for trial in bench.trials(causal=True, ranks=(1,)):
        pieces = bench.draw.split(trial.inputs.x.shape[1])
        direction = bench.draw.normal(*trial.inputs.x.shape)
        gradients = []
        for streamed in (True, False):
            x = trial.inputs.x.clone().requires_grad_()
            y = stream(trial.mixer, x, None, pieces)[0] if streamed else Inputs(x).apply(trial.mixer)
            gradients.append(gradients_of((y * direction).sum(), {"x": x, **dict(trial.mixer.named_parameters())}))
        require_gradients(f"{trial}, in pieces of {pieces}", gradients[0], gradients[1])
    return bench.said()


@conformance(law=4, promise="streaming")
def streaming_keeps_its_input(bench: Bench) -> str:
    """``extend`` leaves the state that it is given as it was, and gives the same again."""
    for trial in bench.trials(causal=True, ranks=(1,)):
        x = trial.inputs.x
        half = x.shape[1] // 2
        with torch.no_grad():
            _, state = stream(trial.mixer, x[:, :half], None, [half])
            before = {name: tensor.clone() for name, tensor in state.items()}
            first, _ = trial.mixer.extend(x[:, half:], state)
            again, _ = trial.mixer.extend(x[:, half:], state)
        for name, tensor in before.items():
            require(torch.equal(tensor, state[name]), f"{trial}: extend changed {name!r} of the state that it was given")
        require(torch.equal(first, again), f"{trial}: extend gave another output for the same state")
    return bench.said()
