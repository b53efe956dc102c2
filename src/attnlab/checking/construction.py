"""What every mixer is: built from typed options on any device and dtype, saved and loaded."""

from __future__ import annotations

import inspect

import torch

from attnlab.checking.bench import Bench
from attnlab.checking.outcome import NotApplicable
from attnlab.checking.require import require
from attnlab.checking.suite import conformance
from attnlab.core.contract import Mixer
from attnlab.core.info import read_options


@conformance(law=0, promise="contract")
def matches_signature(bench: Bench) -> str:
    """The constructor takes dim, num_heads, causal, device and dtype, has no sinks, and forward takes what the contract says."""
    kind = type(bench.subject.mixer(bench.subject.forms[0]))
    options = {option.name: option for option in read_options(kind)}
    order = list(options)[:2]
    require(order == ["dim", "num_heads"], f"constructor: expected to begin with dim, num_heads, got {order}")
    defaults = {"causal": bench.supports.causal == "always", "device": None, "dtype": None}
    for name, default in defaults.items():
        require(name in options, f"constructor: has no argument {name!r}")
        got = options[name].default
        require(got is default, f"constructor: expected {name}={default} by default, got {got}")
    for base in kind.__mro__[: kind.__mro__.index(Mixer)]:
        if "__init__" in vars(base):
            _no_sinks(f"{base.__name__}.__init__", inspect.signature(vars(base)["__init__"]))
    for method in ("forward", "mixing_matrix"):
        expected = list(inspect.signature(getattr(Mixer, method)).parameters)
        names = list(inspect.signature(getattr(kind, method)).parameters)
        require(names == expected, f"{method}: expected the arguments {expected}, got {names}")
    require(bool((kind.__doc__ or "").strip()), "the class has no docstring")
    return f"{len(options)} options"


def _no_sinks(name: str, signature: inspect.Signature) -> None:
    for parameter in signature.parameters.values():
        require(parameter.kind is not parameter.VAR_POSITIONAL, f"{name}: *{parameter.name} swallows any argument")
        typed = "Unpack" in str(parameter.annotation)
        require(parameter.kind is not parameter.VAR_KEYWORD or typed, f"{name}: **{parameter.name} swallows any option")


@conformance(law=0, promise="contract")
def state_dict_round_trip(bench: Bench) -> str:
    """What was learned and drawn can be saved: loaded strictly into another instance it gives the same bits."""
    for trial in bench.trials():
        chosen = {"causal": trial.causal} if bench.supports.causal == "optional" else {}
        other = bench.subject.build(seed=1, **chosen)
        other.load_state_dict(trial.mixer.state_dict(), strict=True)
        with torch.no_grad():
            same = torch.equal(trial.inputs.apply(other), trial.inputs.apply(trial.mixer))
        require(same, f"{trial}: after load_state_dict another instance gives another output")
    return bench.said()


@conformance(law=0, promise="contract")
def meta_device(bench: Bench) -> str:
    """Built on the meta device, all parameters and buffers are there, and a forward pass gives the right shape."""
    meta = torch.device("meta")
    for mixer in _built(bench, device=meta):
        for name, tensor in (*mixer.named_parameters(), *mixer.named_buffers()):
            require(tensor.device == meta, f"device='meta': {name} is on {tensor.device}")
        for rank in sorted(bench.supports.grid):
            inputs = bench.inputs(mixer, bench.draw.grid(rank)).map_tokens(lambda x: x.to(meta, torch.float32))
            masks = [None, torch.ones(inputs.x.shape[:2], dtype=torch.bool, device=meta)] if bench.supports.mask else [None]
            for mask in masks:
                y = mixer(inputs.x, mask=mask, grid=inputs.grid)
                right = y.shape == inputs.x.shape and y.device == meta
                require(right, f"on meta: expected {tuple(inputs.x.shape)}, got {tuple(y.shape)} on {y.device}")
    return bench.said()


@conformance(law=0, promise="contract")
def dtype_device_options(bench: Bench) -> str:
    """``dtype=`` and ``device=`` hold for every parameter, and such a mixer takes and gives that dtype."""
    for dtype in (torch.float64, torch.bfloat16):
        for mixer in _built(bench, dtype=dtype, device=torch.device("cpu")):
            for name, parameter in mixer.named_parameters():
                require(parameter.dtype == dtype, f"dtype={dtype}: {name} has {parameter.dtype}")
            for rank in sorted(bench.supports.grid):
                inputs = bench.inputs(mixer, bench.draw.grid(rank)).map_tokens(lambda x, dtype=dtype: x.to(dtype))
                with torch.no_grad():
                    got = inputs.apply(mixer).dtype
                require(got == dtype, f"dtype={dtype}: the output has {got}")
    return bench.said()


def _built(bench: Bench, **options: object) -> list[Mixer]:
    subject = bench.subject
    if subject.factory is None:
        raise NotApplicable("the target is built already")
    bench.looked_at += len(subject.forms)
    forms = [{"causal": form} if bench.supports.causal == "optional" else {} for form in subject.forms]
    return [subject.construct(**chosen, **options).eval() for chosen in forms]
