"""One rank of a group that torchrun starts: runs the cases named on its command line, and exits with 1 if one fails."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import copy
import sys
import time
import warnings

import torch
import torch.distributed as dist

import attnlab
from attnlab.models import create_model
from attnlab.parallel import Traffic, gather, parallelize, reduce_gradients, restore, sequence_parallel, split, start

DIM, HEADS = 16, 4
BOUND = {torch.float32: 1e-6, torch.float64: 1e-14}
MIXERS = {
    "linear": {},
    "lightning": {"lrpe": True, "gate": True},
    "delta_net": {},
    "mamba": {"state_dim": 4},
    "softmax": {"position": "rotary", "num_kv_heads": 2},
    "sliding_window": {"window": 5, "num_sinks": 2},
}
HYBRID = {
    torch.float64: ["lightning", "softmax", "delta_net", "mamba"],
    # a model with delta_net is as far as 1e-5 from float64 in one process too: what rounds how much there is a matter of luck
    torch.float32: ["lightning", "softmax", "mamba", "softmax"],
}


def uneven(size: int, short: int = 1) -> list[int]:
    """Lengths that differ from rank to rank, one of them of a single token."""
    return [9 + 3 * rank if rank != size // 2 else short for rank in range(size)]


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))


def require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"rank {dist.get_rank()}: {what}")


def same(what: str, got: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor | None = None) -> None:
    """Within the bound of the dtype, or where rounding alone goes beyond it, within three times what it makes of one process."""
    off, bound = distance(got, expected), BOUND[expected.dtype]
    if exact is not None:
        off, bound = distance(got.double(), exact), max(bound, 3.0 * distance(expected.double(), exact))
    require(off <= bound, f"{what}: relative difference {off:.2e}, allowed {bound:.2e}")


def run_whole(module, inputs, mask, weights) -> dict[str, torch.Tensor]:
    """Output and all gradients of one process, by name."""
    inputs = inputs.detach().requires_grad_(inputs.is_floating_point())
    y = module(inputs, mask=mask)
    (y * weights).sum().backward()
    results = {"output": y.detach() * (weights != 0)}
    results |= {"gradient of x": inputs.grad} if inputs.requires_grad else {}
    results |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    return results


def compare(what, parallel, module, inputs, mask, lengths) -> None:
    """Output and gradients of the pieces against those of the sequence; ``inputs`` may be ids."""
    weights = torch.randn_like(module(inputs, mask=mask))
    weights = weights if mask is None else weights * mask[..., None]
    expected, exact = run_whole(module, inputs, mask, weights), {}
    if weights.dtype == torch.float32:
        wide = inputs.double() if inputs.is_floating_point() else inputs
        exact = run_whole(copy.deepcopy(module).double(), wide, mask, weights.double())

    piece = split(inputs, lengths=lengths).clone().requires_grad_(inputs.is_floating_point())
    own = split(weights, lengths=lengths)
    y = parallel(module)(piece, mask=None if mask is None else split(mask, lengths=lengths))
    (y * own).sum().backward()
    reduce_gradients(module)
    got = {"output": gather(y * (own != 0))}
    got |= {"gradient of x": gather(piece.grad)} if piece.requires_grad else {}
    got |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    if exact:  # what float32 rounds in a single parameter's gradient is a matter of luck: all of them are one vector
        got, expected, exact = joined(got), joined(expected), joined(exact)
    for name, value in expected.items():
        if float(value.norm()) > 1e-6:  # a bias of the keys has none under softmax
            same(f"{what}, {name}", got[name], value, exact.get(name))


def joined(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output, and all gradients as one vector."""
    gradients = [value.flatten() for name, value in results.items() if name != "output"]
    return {"output": results["output"], "the gradient": torch.cat(gradients)}


def every_mixer() -> None:
    size = dist.get_world_size()
    for dtype in (torch.float64, torch.float32):
        for lengths in ([6] * size, uneven(size)):
            for masked in (False, True):
                for name, options in MIXERS.items():
                    for causal in (True, False) if name in ("linear", "softmax") else (True,):
                        torch.manual_seed(1)
                        mixer = attnlab.create_mixer(name, DIM, num_heads=HEADS, causal=causal, dtype=dtype, **options)
                        x = torch.randn(2, sum(lengths), DIM, dtype=dtype)
                        mask = torch.rand(2, sum(lengths)) > 0.3 if masked else None
                        said = f"{name}, {dtype}, lengths {lengths}, masked {masked}, causal {causal}"
                        compare(said, sequence_parallel, mixer, x, mask, lengths)


def a_hybrid_model() -> None:
    size = dist.get_world_size()
    lengths = uneven(size)
    for dtype in (torch.float64, torch.float32):
        for position in ("sinusoidal", "learned"):
            for masked in (False, True):
                torch.manual_seed(2)
                model = create_model(
                    "causal_lm",
                    vocab_size=13,
                    dim=DIM,
                    depth=4,
                    mixer=HYBRID[dtype],
                    num_heads=HEADS,
                    position=position,
                    max_length=sum(lengths),
                    short_conv=4,
                    dtype=dtype,
                )
                ids = torch.randint(13, (2, sum(lengths)))
                mask = torch.rand(2, sum(lengths)) > 0.3 if masked else None
                compare(f"hybrid, {dtype}, {position}, masked {masked}", parallelize, model, ids, mask, lengths)
                restore(model)


def bytes_of_linear_layers_do_not_grow() -> None:
    sent = {}
    for name in ("lightning", "delta_net", "softmax"):
        for n in (16, 64):
            torch.manual_seed(3)
            traffic = Traffic()
            layer = sequence_parallel(attnlab.create_mixer(name, DIM, num_heads=HEADS, causal=True), traffic=traffic)
            y = layer(split(torch.randn(2, n, DIM)))
            forward = traffic.bytes()
            y.sum().backward()
            sent[name, n] = forward, traffic.bytes() - forward
            collectives = traffic.calls("summary"), traffic.calls("summary backward")
            require(collectives == (1, 1), f"{name}: expected one gather each way, got {collectives}")
    for name in ("lightning", "delta_net"):
        require(sent[name, 16] == sent[name, 64], f"{name}: {sent}")
    require(all(after > 3.0 * before for before, after in zip(sent["softmax", 16], sent["softmax", 64], strict=True)), f"{sent}")


def ranks_without_loss_or_gradient_do_not_hang() -> None:
    torch.manual_seed(4)
    mixer = attnlab.create_mixer("delta_net", DIM, num_heads=HEADS, dtype=torch.float64)
    x = torch.randn(1, 6 * dist.get_world_size(), DIM, dtype=torch.float64)
    expected = mixer(x)[:, -6:].sum()
    expected.backward()
    wanted = mixer.q_proj.weight.grad.clone()
    mixer.zero_grad()
    last = dist.get_rank() == dist.get_world_size() - 1
    mixer.requires_grad_(last)  # others' own graphs would be empty
    y = sequence_parallel(mixer)(split(x))
    (y.sum() if last else (y * 0).sum()).backward()
    require(last or mixer.q_proj.weight.grad is None, "frozen parameters got gradients")
    reduce_gradients(mixer)
    same("the last rank's own share", mixer.q_proj.weight.grad, wanted)


def rejected(match: str, call) -> None:
    """ValueError with ``match`` in it on this rank, at once."""
    began = time.monotonic()
    try:
        call()
    except ValueError as error:
        require(match in str(error), f"expected {match!r} in {error}")
        require(time.monotonic() - began < 5.0, f"{match!r} took {time.monotonic() - began:.1f} s")
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, str(error))
        require(len(set(texts)) == 1, f"ranks were told different things: {texts}")
        return
    raise AssertionError(f"rank {dist.get_rank()}: expected a ValueError with {match!r}, got none")


def mistakes_are_errors_on_every_rank() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(5)
    mixer = attnlab.create_mixer("linear", DIM, num_heads=HEADS, causal=True)
    layer = sequence_parallel(mixer)
    own = 1 if rank == size - 1 else 0  # the last rank errs
    rejected(
        f"2 ranks, got a group of {size}" if size != 2 else "3 ranks, got a group of 2",
        lambda: sequence_parallel(mixer, size=3 if size == 2 else 2),
    )
    rejected("one a rank", lambda: split(torch.zeros(1, 9, 1), lengths=[9]))
    rejected("batch: expected the same on every rank, got 2 on rank 0", lambda: layer(torch.zeros(2 + own, 4, DIM)))
    rejected(f"width {DIM}, got {DIM + 1}", lambda: layer(torch.zeros(2, 4, DIM + own)))
    rejected("expected dtype torch.float32", lambda: layer(torch.zeros(2, 4, DIM, dtype=[torch.float32, torch.float64][own])))
    rejected("at least one token", lambda: layer(torch.zeros(2, 4 - 4 * own, DIM)))
    rejected("mask: expected shape", lambda: layer(torch.zeros(2, 4, DIM), mask=torch.ones(2, 4 + own, dtype=torch.bool)))
    with torch.set_grad_enabled(not own):
        rejected("gradients: expected the same", lambda: layer(torch.zeros(2, 4, DIM)))
    other = attnlab.create_mixer("linear", DIM, num_heads=HEADS, causal=True, feature_map=["elu", "relu"][own])
    rejected("options: expected the same", lambda: sequence_parallel(other)(torch.zeros(2, 4, DIM)))
    torch.manual_seed(rank)
    unlike = attnlab.create_mixer("linear", DIM, num_heads=HEADS, causal=True)
    rejected("parameters: expected the same", lambda: sequence_parallel(unlike)(torch.zeros(2, 4, DIM)))
    require(layer(torch.randn(2, 4 + own, DIM)).shape == (2, 4 + own, DIM), "the layer works after all that")


CASES = {
    case.__name__: case
    for case in (
        every_mixer,
        a_hybrid_model,
        bytes_of_linear_layers_do_not_grow,
        ranks_without_loss_or_gradient_do_not_hang,
        mistakes_are_errors_on_every_rank,
    )
}

if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    start("gloo", timeout=30.0)
    try:
        for name in sys.argv[1:]:
            CASES[name]()
            print(f"rank {dist.get_rank()} passed {name}\n", end="", flush=True)  # one write: ranks share the pipe
    finally:
        dist.destroy_process_group()
