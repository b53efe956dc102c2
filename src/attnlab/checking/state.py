"""Law 4: the state is bounded as declared, and can be saved, loaded, moved and re-ordered."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from attnlab.checking.bench import Bench
from attnlab.checking.outcome import NotApplicable
from attnlab.checking.require import ROUNDING, require, require_close
from attnlab.checking.streaming import stream
from attnlab.checking.suite import conformance
from attnlab.core.state import State

_PIECE, _PIECES = 64, 4


@conformance(law=4, promise="streaming")
def streaming_state_save_load(bench: Bench) -> str:
    """A state that was written to a file and read again continues with the same outputs, bit for bit."""
    for trial in bench.trials(causal=True, ranks=(1,)):
        x = trial.inputs.x
        cut = bench.draw.integer(1, x.shape[1] - 1)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            for at in sorted({0, cut}):  # the empty state too
                _, state = stream(trial.mixer, x[:, :at], None, [at]) if at else (None, trial.mixer.init_state(x.shape[0]))
                path = Path(folder) / f"{at}.safetensors"
                state.save(path)
                expected, _ = trial.mixer.extend(x[:, at:], state)
                got, _ = trial.mixer.extend(x[:, at:], State.load(path))
                require(torch.equal(got, expected), f"{trial}: saved after {at} tokens and loaded, it continues otherwise")
    return bench.said()


@conformance(law=4, promise="streaming")
def streaming_state_select(bench: Bench) -> str:
    """A state re-ordered by batch, with repeats, continues as the re-ordered sequences do."""
    for trial in bench.trials(causal=True, ranks=(1,), batch=3):
        x = trial.inputs.x
        cut = bench.draw.integer(1, x.shape[1] - 1)
        order = torch.tensor([2, 0, 0, 1])
        for mask in [None, bench.draw.mask("inside", *x.shape[:2])] if bench.supports.mask else [None]:
            later = None if mask is None else mask[:, cut:]
            with torch.no_grad():
                _, state = stream(trial.mixer, x[:, :cut], None if mask is None else mask[:, :cut], [cut])
                expected, _ = trial.mixer.extend(x[:, cut:], state, mask=later)
                got, _ = trial.mixer.extend(x[order, cut:], state.select(order), mask=None if later is None else later[order])
            require_close(f"{trial}: state re-ordered after {cut} tokens", got, expected[order], ROUNDING)
    return bench.said()


@conformance(law=4, promise="streaming")
def streaming_state_dtype(bench: Bench) -> str:
    """A new state is where the parameters are and of their dtype, or of the dtype that is asked for."""
    for trial in bench.trials(causal=True, ranks=(1,)):
        mixer = trial.mixer
        for asked, expected in ((None, torch.float64), (torch.float32, torch.float32)):
            state = mixer.init_state(2) if asked is None else mixer.init_state(2, dtype=asked)  # type: ignore[call-arg]
            for name, tensor in state.items():
                require(tensor.shape[0] == 2, f"state {name!r}: expected batch 2 first, got shape {tuple(tensor.shape)}")
                right = not tensor.is_floating_point() or tensor.dtype == expected
                require(right, f"state {name!r}: expected {expected} for init_state(dtype={asked}), got {tensor.dtype}")
    return bench.said()


@conformance(law=4, promise="state", when=lambda supports: supports.state == "bounded")
def streaming_state_bounded(bench: Bench) -> str:
    """The bytes of the state do not grow with the tokens seen."""
    sizes = _sizes(bench)
    require(sizes[-1] <= sizes[-2], f"declared bounded, but has {sizes} bytes after {_PIECE}, {2 * _PIECE}, ... tokens")
    return f"{sizes[-1]} bytes"


@conformance(law=4, promise="state", when=lambda supports: supports.state == "grows")
def streaming_state_grows(bench: Bench) -> str:
    """The bytes of the state grow with the tokens seen; a state that does not should be declared bounded."""
    sizes = _sizes(bench)
    require(sizes[-1] > sizes[-2], f"declared growing, but has {sizes} bytes after {_PIECE}, {2 * _PIECE}, ... tokens")
    return f"{sizes} bytes after {_PIECE}, {2 * _PIECE}, ... tokens"


def _sizes(bench: Bench) -> list[int]:
    """Bytes of one example's state after each of some pieces."""
    mixer = next(bench.mixers(causal=True), None)
    if mixer is None:
        raise NotApplicable("no form of this mixer is causal")
    sizes, state = [], mixer.init_state(1)
    with torch.no_grad():
        for _ in range(_PIECES):
            _, state = mixer.extend(bench.draw.normal(1, _PIECE, mixer.dim), state)
            sizes.append(state.nbytes)
    return sizes
