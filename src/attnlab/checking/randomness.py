"""Law 9: what is drawn comes from a generator that the caller can give; evaluation draws nothing."""

from __future__ import annotations

import copy

import torch

from attnlab.checking.bench import Bench, Measured, gradients_of, measure
from attnlab.checking.outcome import NotApplicable
from attnlab.checking.require import require
from attnlab.checking.suite import conformance


def _same_bits(a: Measured, b: Measured) -> bool:
    return torch.equal(a.output, b.output) and all(torch.equal(a.gradients[name], b.gradients[name]) for name in a.gradients)


@conformance(law=9, promise="contract")
def determinism(bench: Bench) -> str:
    """In evaluation mode the same input gives the same bits, forward and backward, whatever the global generator holds."""
    for trial in bench.trials():
        torch.manual_seed(1)
        first = measure(trial.mixer, trial.inputs)
        torch.manual_seed(2)
        require(_same_bits(first, measure(trial.mixer, trial.inputs)), f"{trial}: a second pass gives other bits")
    return bench.said()


@conformance(law=9, promise="contract")
def randomness_is_declared(bench: Bench) -> str:
    """Training mode draws nothing from the global generator, unless the constructor has an option ``generator``."""
    if "generator" in bench.subject.option_names:
        raise NotApplicable("the constructor takes a generator")
    for trial in bench.trials():
        outputs = []
        for seed in (1, 2):
            mixer = copy.deepcopy(trial.mixer).train()
            torch.manual_seed(seed)
            with torch.no_grad():
                outputs.append(trial.inputs.apply(mixer))
        require(torch.equal(*outputs), f"{trial}: training draws random numbers, but there is no option 'generator' to draw from")
    return bench.said()


@conformance(law=9, promise="contract")
def generator(bench: Bench) -> str:
    """Two mixers given generators of the same seed have the same bits in training mode, forward and backward."""
    if "generator" not in bench.subject.option_names or bench.subject.factory is None:
        raise NotApplicable("the constructor takes no generator")
    for trial in bench.trials():
        chosen = {"causal": trial.causal} if bench.supports.causal == "optional" else {}
        runs = []
        for seed in (1, 2):
            mixer = bench.subject.build(generator=torch.Generator().manual_seed(7), **chosen).train()
            mixer.load_state_dict(trial.mixer.state_dict())
            torch.manual_seed(seed)
            inputs = trial.inputs.map_tokens(lambda tokens: tokens.detach().clone().requires_grad_())
            output = inputs.apply(mixer)
            leaves = {"x": inputs.x, **dict(mixer.named_parameters())}
            runs.append(Measured(output.detach(), gradients_of(output.sum(), leaves)))
        require(_same_bits(*runs), f"{trial}: generators of the same seed give other outputs or gradients")
    return bench.said()
