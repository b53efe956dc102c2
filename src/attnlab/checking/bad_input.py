"""Law 8: bad input raises ValueError or TypeError that names the argument."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnlab.checking.bench import Bench, Inputs
from attnlab.checking.outcome import NotApplicable, Violation
from attnlab.checking.require import require
from attnlab.checking.subject import DIM, NUM_HEADS
from attnlab.checking.suite import conformance
from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer


@dataclass(frozen=True)
class Mistake:
    """A call that must fail.

    Args:
        said: what is wrong with it.
        argument: what the message must name.
        error: what it must raise.
        call: makes it.
    """

    said: str
    argument: str
    error: type[Exception]
    call: Callable[[], object]


def _demand_errors(mistakes: Iterator[Mistake]) -> str:
    count = 0
    for mistake in mistakes:
        count += 1
        try:
            mistake.call()
        except mistake.error as error:
            named = re.search(rf"\b{mistake.argument}\b", str(error)) is not None
            require(named, f"{mistake.said}: the {type(error).__name__} does not name {mistake.argument!r}: {error}")
        except Exception as error:
            raise Violation(f"{mistake.said}: expected {mistake.error.__name__}, got {type(error).__name__}: {error}") from error
        else:
            raise Violation(f"{mistake.said}: accepted, expected {mistake.error.__name__}")
    if not count:
        raise NotApplicable("no form of this mixer can be given this")
    return f"{count} mistakes"


@conformance(law=8, promise="contract")
def bad_input(bench: Bench) -> str:
    """Tokens, masks and grids of a wrong rank, width, dtype or size raise the right error, which names the argument."""
    return _demand_errors(mistake for mixer in bench.mixers() for mistake in _in_forward(bench, mixer))


@conformance(law=8, promise="streaming")
def bad_input_streaming(bench: Bench) -> str:
    """Pieces and states that do not fit raise the right error, which names the argument."""
    return _demand_errors(mistake for mixer in bench.mixers(causal=True) for mistake in _in_extend(bench, mixer))


@conformance(law=8, promise="varlen")
def bad_input_packed(bench: Bench) -> str:
    """Packed tokens and lengths that do not fit raise the right error, which names the argument."""
    return _demand_errors(mistake for mixer in bench.mixers() for mistake in _in_packed(bench, mixer))


@conformance(law=8, promise="contract")
def bad_options(bench: Bench) -> str:
    """Widths, heads and unknown options raise the right error; for a registered mixer the nearest option is named."""
    return _demand_errors(_in_constructor(bench))


def _in_forward(bench: Bench, mixer: Mixer) -> Iterator[Mistake]:
    inputs = bench.inputs(mixer, bench.draw.grid(min(bench.supports.grid)))
    x = inputs.x
    n = x.shape[1]

    def wrong(said: str, argument: str, error: type[Exception], **changes: Any) -> Mistake:
        return Mistake(said, argument, error, lambda: replace(inputs, **changes).apply(mixer))

    def not_tensor() -> object:
        return mixer(x.tolist())

    yield Mistake("x a list", "x", TypeError, not_tensor)
    yield wrong("x of 2 dimensions", "x", ValueError, x=x[0])
    yield wrong("x too wide", "x", ValueError, x=torch.cat([x, x], dim=-1))
    yield wrong("x without tokens", "x", ValueError, x=x[:, :0], grid=None)
    if mixer.fixed_tokens is not None:
        yield wrong("x of a token more", "x", ValueError, x=torch.cat([x, x[:, :1]], dim=1), grid=None)
    yield wrong("x of integers", "x", TypeError, x=x.long())
    if any(True for _ in mixer.parameters()):
        yield wrong("x of another dtype than the parameters", "x", TypeError, x=x.float())
        yield wrong("x on another device than the parameters", "x", ValueError, x=x.to("meta"))
    yield wrong("grid with another product", "grid", ValueError, grid=(n + 1,) * min(bench.supports.grid))
    yield wrong("grid with a negative side", "grid", ValueError, grid=(-n,) * min(bench.supports.grid))
    yield wrong("grid of floats", "grid", TypeError, grid=(float(n),))
    yield from _in_masks(bench, mixer, inputs)


def _in_masks(bench: Bench, mixer: Mixer, inputs: Inputs) -> Iterator[Mistake]:
    supports, (batch, n) = bench.supports, inputs.x.shape[:2]

    def wrong(said: str, argument: str, error: type[Exception], **changes: Any) -> Mistake:
        return Mistake(said, argument, error, lambda: replace(inputs, **changes).apply(mixer))

    ones = torch.ones(batch, n, dtype=torch.bool)
    if supports.mask:
        yield wrong("mask too long", "mask", ValueError, mask=torch.ones(batch, n + 1, dtype=torch.bool))
        yield wrong("mask of one example", "mask", ValueError, mask=ones[:1])
        yield wrong("mask of floats with NaN", "mask", TypeError, mask=torch.full((batch, n), float("nan")))
        yield wrong("mask of integers", "mask", TypeError, mask=ones.long())
    if supports.pair_mask:
        pairs = torch.ones(1, 1, n, n + 1, dtype=torch.bool)
        yield wrong("pair_mask with too many keys", "pair_mask", ValueError, pair_mask=pairs)
        yield wrong("pair_mask of 2 dimensions", "pair_mask", ValueError, pair_mask=pairs[0, 0, :, :n])
        yield wrong("pair_mask of floats", "pair_mask", TypeError, pair_mask=pairs[..., :n].float())
    yield wrong("context_mask without context", "context_mask", ValueError, context_mask=ones)
    if supports.cross and not mixer.causal:
        context = bench.draw.normal(batch, n + 2, mixer.context_dim)
        yield wrong("context too wide", "context", ValueError, context=torch.cat([context, context], dim=-1))
        yield wrong("context of another batch size", "context", ValueError, context=context[:1])
        yield wrong("context without tokens", "context", ValueError, context=context[:, :0])
        if supports.mask:
            yield wrong("context_mask of x's length", "context_mask", ValueError, context=context, context_mask=ones)


def _in_extend(bench: Bench, mixer: Mixer) -> Iterator[Mistake]:
    x, state = bench.draw.normal(2, 3, mixer.dim), mixer.init_state(2)
    yield Mistake("state a dict", "state", TypeError, lambda: mixer.extend(x, dict(state)))  # type: ignore[arg-type]
    yield Mistake("state of another batch size", "state", ValueError, lambda: mixer.extend(x[:1], state))
    yield Mistake("x of 2 dimensions", "x", ValueError, lambda: mixer.extend(x[0], state))
    yield Mistake("x without tokens", "x", ValueError, lambda: mixer.extend(x[:, :0], state))
    yield Mistake("x of another dtype than the parameters", "x", TypeError, lambda: mixer.extend(x.float(), state))
    yield Mistake("batch_size=0", "batch_size", ValueError, lambda: mixer.init_state(0))
    if bench.supports.mask:
        mask = torch.ones(2, 4, dtype=torch.bool)
        yield Mistake("mask too long", "mask", ValueError, lambda: mixer.extend(x, state, mask=mask))


def _in_packed(bench: Bench, mixer: Mixer) -> Iterator[Mistake]:
    x = bench.draw.normal(6, mixer.dim)

    def wrong(said: str, argument: str, error: type[Exception], *starts: float | int, tokens: Tensor = x) -> Mistake:
        return Mistake(said, argument, error, lambda: mixer.packed(tokens, torch.tensor(starts)))

    yield wrong("x of 3 dimensions", "x", ValueError, 0, 6, tokens=x[None])
    yield wrong("x too wide", "x", ValueError, 0, 6, tokens=torch.cat([x, x], dim=-1))
    yield wrong("cu_seqlens beyond the tokens", "cu_seqlens", ValueError, 0, 4, 7)
    yield wrong("cu_seqlens short of the tokens", "cu_seqlens", ValueError, 0, 4)
    yield wrong("cu_seqlens with an empty sequence", "cu_seqlens", ValueError, 0, 4, 4, 6)
    yield wrong("cu_seqlens of floats", "cu_seqlens", TypeError, 0.0, 6.0)


def _in_constructor(bench: Bench) -> Iterator[Mistake]:
    subject = bench.subject
    if subject.factory is not None:

        def wrong(said: str, argument: str, error: type[Exception], **options: Any) -> Mistake:
            return Mistake(said, argument, error, lambda: subject.construct(**options))

        yield wrong("dim no multiple of num_heads", "dim", ValueError, dim=DIM + 1, num_heads=NUM_HEADS)
        yield wrong("dim=0", "dim", ValueError, dim=0)
        yield wrong("num_heads=0", "num_heads", ValueError, num_heads=0)
        yield wrong("dim a float", "dim", TypeError, dim=float(DIM))
        if subject.registered is None:
            yield wrong("unknown option", "num_headz", TypeError, num_headz=2)
    if subject.registered is not None:
        name = subject.registered
        yield Mistake("unknown option", "num_heads", ValueError, lambda: mixers.create(name, dim=DIM, num_headz=2))
