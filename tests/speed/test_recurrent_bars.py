"""What linear attention, recurrences and memories promise on CPU, as ratios in one run: ``pytest -m speed``, all quiet."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from attnlab import create_mixer, list_mixers, mixer_info
from attnlab.core.masks import Masks
from attnlab.mixers.linear.core import LinearMixer
from attnlab.mixers.linear.flow import FlowAttention
from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.gated_linear_attention import gated_linear_attention
from attnlab.ops.linear_attention import linear_attention
from attnlab.ops.prefix_softmax import prefix_softmax
from attnlab.ops.selective_scan import selective_scan
from speed.timing import causal_sdpa, fastest, forward_and_backward, peak_bytes, ratio, seconds

pytestmark = pytest.mark.speed
DIM, HEADS, WIDTH, LENGTH = 256, 8, 32, 4096
DECAY = -torch.tensor([2.0**-h for h in range(1, HEADS + 1)])
LINEAR = [
    (name, causal)
    for name in list_mixers(family="linear")
    if isinstance(create_mixer(name, 16, 2, **dict(mixer_info(name).example)), (LinearMixer, FlowAttention))
    for causal in ((False,) if mixer_info(name).supports.causal == "no" else (False, True))
]
BY_TOKEN = [name for name in list_mixers(cost=1.0) if mixer_info(name).family in ("linear", "recurrent", "memory")]


def heads(n: int) -> list[torch.Tensor]:
    q, k, v = (torch.randn(1, n, HEADS, WIDTH).transpose(1, 2) for _ in range(3))
    return [q, F.normalize(k, dim=-1), v]


def decays(n: int, width: int) -> torch.Tensor:
    return F.logsigmoid(torch.randn(1, n, HEADS, width).transpose(1, 2)) / 16


OPS = {
    "no decay": (lambda q, k, v: linear_attention(q, k, v)[0], heads, 0.15),
    "a decay a head": (lambda q, k, v: linear_attention(q, k, v, log_decay=DECAY)[0], heads, 0.15),
    "a decay a head and token": (lambda *x: gated_linear_attention(*x)[0], lambda n: [*heads(n), decays(n, 1)], 0.15),
    "a decay a channel and token": (lambda *x: gated_linear_attention(*x)[0], lambda n: [*heads(n), decays(n, WIDTH)], 0.15),
    "prefix softmax": (lambda s, v: prefix_softmax(s, v)[0], lambda n: [torch.randn(1, HEADS, n), heads(n)[2]], 0.15),
    "delta rule": (lambda *x: delta_rule(*x)[0], lambda n: [*heads(n), torch.rand(1, HEADS, n)], 0.40),
    "gated delta rule": (
        lambda q, k, v, b, g: delta_rule(q, k, v, b, log_decay=g)[0],
        lambda n: [*heads(n), torch.rand(1, HEADS, n), decays(n, 1).squeeze(-1)],
        0.40,
    ),
}


def sdpa(causal: bool):
    return causal_sdpa if causal else F.scaled_dot_product_attention


def attends(name: str, causal: bool):
    """The operator of a linear mixer on queries, keys and values."""
    mixer = create_mixer(name, DIM, HEADS, **({"causal": True} if causal else {}))
    return lambda q, k, v: mixer.attend(q, k, v, Masks(), (q.shape[2],))


@pytest.mark.parametrize("name", sorted(OPS))
def test_operators(name) -> None:
    function, make, bar = OPS[name]
    share = ratio(forward_and_backward(function, *make(LENGTH)), forward_and_backward(causal_sdpa, *heads(LENGTH)))
    print(f"{name}: {share:.3f} of SDPA, bar {bar}")
    assert share <= bar


@pytest.mark.parametrize(("name", "causal"), LINEAR)
def test_linear_cores(name, causal) -> None:
    ours, theirs = attends(name, causal), sdpa(causal)
    share = ratio(forward_and_backward(ours, *heads(LENGTH)), forward_and_backward(theirs, *heads(LENGTH)))
    bar = 0.15 if causal else 0.08
    print(f"{name}, {'causal' if causal else 'not causal'}: {share:.3f} of SDPA, bar {bar}")
    assert share <= bar


@pytest.mark.parametrize("name", sorted(OPS))
def test_operators_grow_linearly(name) -> None:
    function, make, _ = OPS[name]
    times = {n: fastest(forward_and_backward(function, *make(n))) for n in (2048, 16384)}
    exponent = math.log(times[16384] / times[2048]) / math.log(8)
    print(f"{name}: n^{exponent:.2f}")
    assert exponent <= 1.15


@pytest.mark.parametrize("name", BY_TOKEN)
def test_layers_grow_linearly(name) -> None:
    causal = mixer_info(name).supports.causal != "no"
    mixer = create_mixer(name, DIM, HEADS, causal=causal)
    times = {n: fastest(forward_and_backward(mixer, torch.randn(1, n, DIM)), 3) for n in (2048, 16384)}
    exponent = math.log(times[16384] / times[2048]) / math.log(8)
    softmax = fastest(forward_and_backward(create_mixer("softmax", DIM, HEADS, causal=causal), torch.randn(1, 2048, DIM)), 3)
    print(f"{name}: n^{exponent:.2f}, {times[2048] / softmax:.2f} of a softmax layer's time at 2048 tokens")
    assert exponent <= 1.15


@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_long_sequence_fits(name) -> None:
    causal = mixer_info(name).supports.causal != "no"
    setup = f"""
from attnlab import create_mixer
torch.set_grad_enabled(False)
mixer = create_mixer({name!r}, {DIM}, {HEADS}, causal={causal}).eval()
mixer(torch.randn(1, 256, {DIM}))
x = torch.randn(1, 131072, {DIM})
"""
    peak = peak_bytes(setup, "mixer(x)")
    print(f"{name}: {peak / 2**20:.0f} MiB above the input at 131,072 tokens")
    assert peak < 2 * 2**30


@pytest.mark.parametrize("name", ["lightning", "delta_net", "mamba", "aaren", "titans"])
def test_a_million_tokens_stream_by(name) -> None:
    setup = f"""
from attnlab import create_mixer
torch.set_grad_enabled(False)
mixer = create_mixer({name!r}, {DIM}, {HEADS}, causal=True).eval()
state, piece = mixer.init_state(1), 4096
x = torch.randn(1, piece, {DIM})
for _ in range(64):
    y, state = mixer.extend(x, state)
first = state.nbytes
"""
    work = "for _ in range(184): y, state = mixer.extend(x, state)\nassert state.nbytes == first and y.isfinite().all()"
    peak = peak_bytes(setup, work)
    print(f"{name}: {peak / 2**20:.0f} MiB more than after 262,144 tokens")
    assert peak < 32 * 2**20


def test_the_scan_against_its_bound() -> None:
    """Bytes and exponentials of the scan, at the speeds that this machine has for a copy and for exp2, and the share reached."""
    n, inner, states = LENGTH, 512, 16
    u, dt = torch.randn(1, n, inner), torch.rand(1, n, inner) * 0.1
    A, B, C = -torch.arange(1.0, states + 1).expand(inner, -1).contiguous(), torch.randn(1, n, states), torch.randn(1, n, states)
    block = torch.rand(2**18)
    out = torch.empty_like(block)
    exponentials = block.numel() / fastest(lambda: torch.exp2(block, out=out), 50)
    large = torch.rand(2**26)
    target = torch.empty_like(large)
    copied = 2 * 4 * large.numel() / fastest(lambda: target.copy_(large), 5)
    multiply_adds = block.numel() / fastest(lambda: out.addcmul_(block, block), 50)
    elements = n * inner * states
    # forward: u, dt in, y out; a state is one exponential, a product with the rate, one multiply-add for input, decay and output
    bound = max(3 * 4 * n * inner / copied, elements / exponentials + 3 * elements / multiply_adds)
    with torch.no_grad():
        took = fastest(lambda: selective_scan(u, dt, A, B, C), 7)
    print(f"scan forward {took * 1e3:.1f} ms, bound {bound * 1e3:.1f} ms: share {bound / took:.2f}")
    assert seconds(lambda: None) < took and bound / took > 0.1
