"""Law 4: pieces summed up apart and put together in any grouping are the state of the whole."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from attnlab.checking.bench import Bench, Trial
from attnlab.checking.require import FORWARD, require, require_close
from attnlab.checking.streaming import stream
from attnlab.checking.suite import conformance
from attnlab.core.state import Before, State
from attnlab.core.streaming import StreamingMixer

_PIECES = 3


def before(mixer: StreamingMixer, x: Tensor, mask: Tensor | None, start: int) -> Before:
    """What stands before token ``start`` of ``x``."""
    batch, width = x.shape[0], mixer.lookback
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    tokens, known = x.new_zeros(batch, width, x.shape[2]), real.new_zeros(batch, width)
    have = min(width, start)
    tokens[:, width - have :], known[:, width - have :] = x[:, start - have : start], real[:, start - have : start]
    return Before(tokens, known, torch.full((batch,), start), real[:, :start].sum(1))


def _require_memory(said: str, mixer: StreamingMixer, got: State, expected: State) -> None:
    for name in mixer.memory:
        require(name in got, f"{said}: memory {name!r} is missing from what combine gives, {sorted(got)}")
        found, wanted = (t.int() if t.dtype == torch.bool else t for t in (got[name], expected[name]))
        require_close(f"{said}, memory {name!r}", found, wanted, FORWARD)


def _pieces(bench: Bench, trial: Trial) -> tuple[list[int], list[slice]]:
    n = trial.inputs.x.shape[1]
    cuts = sorted({0, n, *(bench.draw.integer(1, max(1, n - 1)) for _ in range(_PIECES - 1))})
    return cuts, [slice(*edges) for edges in itertools.pairwise(cuts)]


@conformance(law=4, promise="associative")
def combined_pieces(bench: Bench) -> str:
    """Summaries of pieces, combined in any grouping, are the memory of the whole, and a piece goes on from them."""
    for trial in bench.trials(causal=True, ranks=(1,)):
        mixer, x = trial.mixer, trial.inputs.x
        if not isinstance(mixer, StreamingMixer):
            require(False, f"{trial}: associative is promised by something that is no StreamingMixer")
            continue
        cuts, pieces = _pieces(bench, trial)
        for mask in [None, bench.draw.mask("inside", *x.shape[:2])] if bench.supports.mask else [None]:
            masks = [None if mask is None else mask[:, piece] for piece in pieces]
            with torch.no_grad():
                whole, state = stream(mixer, x, mask, [x.shape[1]])
                places = [before(mixer, x, mask, piece.start) for piece in pieces]
                parts = [
                    mixer.summarize(x[:, piece], place, mask=real)
                    for piece, place, real in zip(pieces, places, masks, strict=True)
                ]
                said = f"{trial}, cut at {cuts[1:-1]}{'' if mask is None else ', with a mask'}"
                left, right = parts[0], parts[-1]
                for part in parts[1:]:
                    left = mixer.combine(left, part)
                for part in reversed(parts[:-1]):
                    right = mixer.combine(part, right)
                empty = mixer.init_state(x.shape[0])
                _require_memory(f"{said}, from the left", mixer, mixer.combine(empty, left), state)
                _require_memory(f"{said}, from the right", mixer, mixer.combine(empty, right), state)
                last = mixer.opening(x[:, pieces[-1]], places[-1])
                for part in parts[:-1]:
                    last = mixer.combine(last, part)
                y, _ = mixer.extend(x[:, pieces[-1]], last, mask=masks[-1])
                require_close(f"{said}, the last piece after the others' summaries", y, whole[:, pieces[-1]], FORWARD)
    return bench.said()


@conformance(law=4, promise="dynamics")
def dynamics_are_the_mixing_matrix(bench: Bench) -> str:
    """The recurrence of `dynamics`, unrolled, is the mixing matrix."""
    for trial in bench.trials(causal=True, ranks=(1,)):
        mixer, x = trial.mixer, trial.inputs.x
        for mask in [None, bench.draw.mask("inside", *x.shape[:2])] if bench.supports.mask else [None]:
            with torch.no_grad():
                unrolled = mixer.dynamics(x, mask=mask).matrix()
                expected = mixer.mixing_matrix(x, mask=mask)
            if mask is not None:
                unrolled = unrolled.masked_fill(~mask[:, None, :, None], 0.0)
            require_close(f"{trial}{'' if mask is None else ', with a mask'}", unrolled, expected, FORWARD)
    return bench.said()
