"""Law 7: what is not promised is refused, in words that help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from attnlab.checking.bench import Bench
from attnlab.checking.outcome import Violation
from attnlab.checking.require import require
from attnlab.checking.suite import conformance
from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.errors import UnsupportedError
from attnlab.core.state import State


@dataclass(frozen=True)
class Request:
    """Something that a mixer does not promise.

    Args:
        asked: what, in words.
        call: asks for it.
        wanted: the filter of `attnlab.list_mixers` that finds mechanisms that have it; empty if none can.
    """

    asked: str
    call: Callable[[], object]
    wanted: dict[str, object]


@conformance(law=7, promise="refusals")
def refusals(bench: Bench) -> str:
    """Everything that is not promised raises UnsupportedError that names the mechanism, what was asked, and who can."""
    count = 0
    for mixer in bench.mixers():
        for request in (*_constructions(bench, mixer), *_arguments(bench, mixer)):
            _demand_refusal(mixer, request)
            count += 1
    return f"{count} requests"


def _demand_refusal(mixer: Mixer, request: Request) -> None:
    said = f"causal={mixer.causal}, {request.asked}"
    try:
        request.call()
    except UnsupportedError as error:
        message, others = str(error), set(mixers.names(**request.wanted)) if request.wanted else set()  # type: ignore[arg-type]
        require(mixer.info.name in message, f"{said}: the refusal does not name the mechanism: {message}")
        require(bool(error.asked) and error.asked in message, f"{said}: the refusal does not say what was asked: {message}")
        if others - {mixer.info.name}:
            require(bool(error.alternatives), f"{said}: the refusal names no mechanism that can, as {min(others)!r}: {message}")
            wrong = set(error.alternatives) - others
            require(not wrong, f"{said}: the refusal names {sorted(wrong)}, which cannot either")
    except Exception as error:
        raise Violation(f"{said}: expected UnsupportedError, got {type(error).__name__}: {error}") from error
    else:
        raise Violation(f"{said}: is not promised, but is not refused")


def _constructions(bench: Bench, mixer: Mixer) -> Iterator[Request]:
    subject, have = bench.subject, bench.supports.causal
    if subject.factory is None or "causal" in subject.options or have == "optional":
        return
    if have == "no":
        yield Request("causal=True", lambda: subject.construct(causal=True), {"causal": True})
    else:
        yield Request("causal=False", lambda: subject.construct(causal=False), {"causal": "optional"})


def _arguments(bench: Bench, mixer: Mixer) -> Iterator[Request]:
    supports = bench.supports
    inputs = bench.inputs(mixer, bench.draw.grid(min(supports.grid)))
    x = inputs.x
    batch, n = x.shape[:2]
    if not supports.cross or mixer.causal:
        context = bench.draw.normal(batch, n + 1, mixer.context_dim)
        wanted: dict[str, object] = {} if supports.cross else {"cross": True}
        yield Request("context", lambda: replace(inputs, context=context).apply(mixer), wanted)
    if not supports.mask:
        mask = torch.ones(batch, n, dtype=torch.bool)
        yield Request("mask", lambda: replace(inputs, mask=mask).apply(mixer), {"mask": True})
    if not supports.pair_mask:
        pairs = torch.ones(1, 1, n, n, dtype=torch.bool)
        yield Request("pair_mask", lambda: replace(inputs, pair_mask=pairs).apply(mixer), {"pair_mask": True})
    if not supports.varlen:
        lengths = torch.tensor([0, n])
        yield Request("packed sequences", lambda: mixer.packed(x[0], lengths), {"varlen": True})
    if not supports.mixing_matrix:
        yield Request("mixing_matrix", lambda: inputs.matrix(mixer), {"mixing_matrix": True})
    if not supports.streaming or not mixer.causal:
        wanted = {} if supports.streaming else {"streaming": True}
        yield Request("init_state", lambda: mixer.init_state(batch), wanted)
        yield Request("extend", lambda: mixer.extend(x, State({"none": torch.zeros(batch)})), wanted)
    if not supports.associative:
        nothing = State({"none": torch.zeros(batch)})
        yield Request("summarize", lambda: mixer.summarize(x), {"associative": True})
        yield Request("combine", lambda: mixer.combine(nothing, nothing), {"associative": True})
    if not supports.dynamics or not mixer.causal:
        wanted = {} if supports.dynamics else {"dynamics": True}
        yield Request("dynamics", lambda wanted=wanted: mixer.dynamics(x), wanted)
    for rank in {1, 2, 3} - supports.grid:
        other = bench.inputs(mixer, (2,) * rank)
        grid = other.grid or (other.x.shape[1] - mixer.num_prefix,)
        yield Request(f"grid={grid}", lambda other=other, grid=grid: replace(other, grid=grid).apply(mixer), {"grid": rank})
