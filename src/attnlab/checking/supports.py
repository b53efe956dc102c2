"""Law 7: flags tell the truth in both directions; what a mixer can do it does not deny."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnlab.checking.bench import Bench, Trial
from attnlab.checking.causality import LEAK, sensitivity
from attnlab.checking.matrix import recorded
from attnlab.checking.outcome import Violation
from attnlab.checking.require import FORWARD, distance, require, require_close
from attnlab.checking.suite import conformance
from attnlab.core.contract import Mixer
from attnlab.core.masks import Masks


@conformance(law=7, promise="contract")
def flags_agree(bench: Bench) -> str:
    """The flags do not contradict one another."""
    have = bench.supports
    require(bool(have.grid) and have.grid <= {1, 2, 3}, f"grid: expected some of the ranks 1, 2, 3, got {sorted(have.grid)}")
    require((have.state != "none") == have.streaming, f"streaming={have.streaming} contradicts state={have.state!r}")
    require(not have.streaming or have.causal != "no", "streaming=True contradicts causal='no'")
    require(not have.streaming or have.tokens_option is None, "streaming=True contradicts tokens_option: pieces are shorter")
    named = have.tokens_option is None or have.tokens_option in bench.subject.option_names
    require(named, f"tokens_option: expected an option of the constructor, got {have.tokens_option!r}")
    require(not have.associative or have.streaming, "associative=True contradicts streaming=False")
    require(not have.dynamics or have.mixing_matrix, "dynamics=True contradicts mixing_matrix=False: they imply one")
    require(not have.streaming or 1 in have.grid, f"streaming=True contradicts grid={sorted(have.grid)}: pieces are sequences")
    require(
        not have.permutation_equivariant or have.causal != "always", "permutation_equivariant=True contradicts causal='always'"
    )
    require(
        not have.cross or have.causal != "always", "cross=True contradicts causal='always': two sequences have no common order"
    )
    return "the flags"


@conformance(law=7, promise="refusals", when=lambda supports: supports.causal != "always")
def reads_the_future(bench: Bench) -> str:
    """Not causal means that some output does depend on a later input; otherwise the mixer is causal and has to say so."""
    for mixer in bench.mixers(causal=False):
        inputs = bench.inputs(mixer, bench.draw.grid(min(bench.supports.grid)))
        later = (sensitivity(mixer, inputs, t)[:, t + 1 :] for t in range(inputs.x.shape[1] - 1))
        read = any(float(moved.max()) > LEAK for moved in later)
        require(read, f"no output depends on a later input: declare causal='always', not {bench.supports.causal!r}")
    return bench.said()


def _permuted(bench: Bench, trial: Trial) -> tuple[float, float]:
    """Difference between permuting before and after, and the size of the output."""
    n = trial.inputs.x.shape[1]
    order = bench.draw.permutation(n)
    with torch.no_grad():
        after = trial.inputs.apply(trial.mixer)[:, order]
        before = replace(trial.inputs, x=trial.inputs.x[:, order]).apply(trial.mixer)
    return distance(before, after), float(after.abs().max())


@conformance(law=7, promise="permutation_equivariant")
def permutation_equivariant(bench: Bench) -> str:
    """Permuting the tokens permutes the output, when not causal."""
    for trial in bench.trials(causal=False):
        difference, size = _permuted(bench, trial)
        require(difference <= FORWARD * size, f"{trial}: permuting the tokens changes the output by {difference:.3g}")
    return bench.said()


@conformance(
    law=7, promise="refusals", when=lambda supports: not supports.permutation_equivariant and supports.causal != "always"
)
def order_matters(bench: Bench) -> str:
    """Not permutation_equivariant means that the order of the tokens matters, when not causal; otherwise the flag lies."""
    for mixer in bench.mixers(causal=False):
        rank = min(bench.supports.grid)
        sizes = [bench.draw.grid(rank), (*[4] * (rank - 1), 64 // 4 ** (rank - 1) + 1)]  # a window may hold all of a short one
        trials = [Trial(mixer, bench.inputs(mixer, grid), mixer.causal) for grid in sizes]
        moved = any(difference > FORWARD * size for difference, size in (_permuted(bench, trial) for trial in trials))
        require(moved, "permuting the tokens only permutes the output: declare permutation_equivariant=True")
    return bench.said()


def _mix(mixer: Mixer, trial: Trial, pairs: torch.Tensor | None) -> torch.Tensor:
    x = trial.inputs.x
    grid = trial.inputs.grid or (x.shape[1] - mixer.num_prefix,)
    return mixer.mix(x, None, Masks(pair=pairs), grid)


@conformance(law=7, promise="refusals", when=lambda supports: not supports.pair_mask)
def no_pair_mask(bench: Bench) -> str:
    """What refuses pair_mask cannot do it: its ``mix`` does not respect one."""
    for trial in bench.trials():
        n = trial.inputs.x.shape[1]
        pairs = bench.draw.pair_mask(1, 1, n, n)
        x = trial.inputs.x.clone().requires_grad_()
        asked = replace(trial, inputs=replace(trial.inputs, x=x))
        try:
            respected = all(_left_out(asked, pairs, t) for t in (n // 2, n - 1))
        except Exception:  # whatever it is, it cannot
            continue
        require(not respected, f"{trial}: mix respects a pair_mask, which is refused: declare pair_mask=True")
    return bench.said()


def _left_out(trial: Trial, pairs: torch.Tensor, t: int) -> bool:
    """Whether what row t of ``pairs`` leaves out no longer moves output t, though it does without ``pairs``."""
    x = trial.inputs.x
    keys = ~pairs[0, 0, t] & (torch.arange(x.shape[1]) != t)
    moved = []
    for chosen in (pairs, None):
        (gradient,) = torch.autograd.grad(_mix(trial.mixer, trial, chosen)[:, t].square().sum(), x, materialize_grads=True)
        moved.append(float(gradient[:, keys].abs().max()))
    return moved[0] <= LEAK < moved[1]


@conformance(law=7, promise="refusals", when=lambda supports: not supports.mixing_matrix)
def no_mixing_matrix(bench: Bench) -> str:
    """What refuses a mixing matrix has none: its ``matrix`` does not give what multiplies the values."""
    for trial in bench.trials():
        mixer, inputs = trial.mixer, trial.inputs
        grid = inputs.grid or (inputs.x.shape[1] - mixer.num_prefix,)
        try:
            with torch.no_grad():
                matrix = mixer.matrix(inputs.x, None, Masks(), grid)
                values, mixed = recorded(mixer, inputs)
            require_close("matrix @ values", matrix @ values, mixed, FORWARD)
        except Exception:  # whatever it is, it has none
            continue
        raise Violation(f"{trial}: matrix gives what multiplies the values, but is refused: declare mixing_matrix=True")
    return bench.said()
