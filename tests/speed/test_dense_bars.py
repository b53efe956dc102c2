"""What the dense operator's slots cost against PyTorch's SDPA, in time and memory: ``pytest -m speed`` on a quiet machine."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import Tokens, create_mixer, pack, unpack
from attnlab.channel_mixers import create_channel_mixer
from attnlab.models.block import Block
from attnlab.ops.attention import ClippedSoftmax, Pairwise, attention
from speed.timing import forward_and_backward, peak_bytes, ratio, seconds

pytestmark = pytest.mark.speed
HEADS, WIDTH = 8, 64


def _heads(n: int) -> list[Tensor]:
    return [torch.randn(1, HEADS, n, WIDTH) for _ in range(3)]


def _with(normalizer):
    return lambda q, k, v: attention(q, k, v, normalizer=normalizer)


def _relative(q, k, v, keys):
    return attention(q, k, v, bias=Pairwise(keys=keys))


def _relative_inputs(n: int) -> list[Tensor]:
    return [*_heads(n), torch.randn(HEADS, 2 * n - 1, WIDTH)]


OPS = {
    "sigmoid": (_with("sigmoid"), _heads),
    "relu": (_with("relu"), _heads),
    "identity": (_with("identity"), _heads),
    "tanh": (_with("tanh"), _heads),
    "softmax_plus_one": (_with("softmax_plus_one"), _heads),
    "clipped_softmax": (_with(ClippedSoftmax(-0.001)), _heads),
    "relative": (_relative, _relative_inputs),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalizer", ["sigmoid", "relu", "identity", "tanh"])
def test_elementwise_normalizers_against_sdpa(normalizer, causal) -> None:
    ours = forward_and_backward(lambda q, k, v: attention(q, k, v, normalizer=normalizer, causal=causal), *_heads(4096))
    theirs = forward_and_backward(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), *_heads(4096))
    measured = ratio(ours, theirs)
    print(f"{normalizer}, causal={causal}: {measured:.2f} of SDPA")
    assert measured <= 1.6


def _peak(name: str, n: int) -> int:
    setup = f"""
import sys
sys.path.insert(0, "tests")
from speed.test_dense_bars import OPS
from speed.timing import forward_and_backward
function, make = OPS[{name!r}]
forward_and_backward(function, *make(256))()
run = forward_and_backward(function, *make({n}))
"""
    return peak_bytes(setup, "run()")


@pytest.mark.parametrize("name", sorted(OPS))
def test_memory_at_8192(name) -> None:
    measured = _peak(name, 8192)
    print(f"{name}: {measured / 2**20:.0f} MiB above the inputs")
    assert measured < 1.5 * 2**30


def test_relative_attention_takes_memory_of_the_order_of_its_table() -> None:
    sizes = {n: _peak("relative", n) for n in (4096, 8192, 16384)}
    exponent = math.log(sizes[16384] / sizes[4096]) / math.log(4)
    table = 2 * 16384 * HEADS * WIDTH * 4
    print(f"relative: n^{exponent:.2f}", {n: f"{size / 2**20:.0f} MiB" for n, size in sizes.items()})
    assert exponent <= 1.15
    assert sizes[16384] < 8 * table  # an n x n tensor of one head alone takes 16 tables


def test_a_packed_layer_against_the_padded_one() -> None:
    longest, dim = 512, 256
    generator = torch.Generator().manual_seed(0)
    # Log-normal lengths, cut at the longest: a quarter of it on average.
    drawn = torch.randn(32, generator=generator).mul(0.8).add(math.log(longest / 5.5)).exp().long().clamp(1, longest)
    lengths = drawn.index_fill(0, torch.tensor([0]), longest)
    share = float(lengths.float().mean()) / longest
    assert 0.2 < share < 0.3
    mask = torch.arange(longest) < lengths[:, None]
    block = Block(dim, create_mixer("softmax", dim, 8), create_channel_mixer("mlp", dim))
    tokens = Tokens(torch.randn(32, longest, dim).masked_fill(~mask[..., None], 0.0), mask=mask)
    padded, packed = block(tokens).x, unpack(block(pack(tokens)), mask).x
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)
    for name, grad in (("forward", False), ("forward and backward", True)):

        def run(packing: bool, grad: bool = grad) -> None:
            with torch.set_grad_enabled(grad):
                out = unpack(block(pack(tokens)), mask).x if packing else block(tokens).x
                if grad:
                    out.sum().backward()

        measured = ratio(lambda: run(True), lambda: run(False))
        print(f"packed, {name}: {measured:.2f} of padded at a mean length of {share:.2f} of the longest")
        assert measured <= 0.45


def test_decoding_costs_little_over_one_call_on_the_same_keys() -> None:
    mixer = create_mixer("softmax", HEADS * WIDTH, HEADS, causal=True).eval()
    q, k, v = torch.randn(1, HEADS, 1, WIDTH), *(torch.randn(1, HEADS, 65536, WIDTH) for _ in range(2))
    x = torch.randn(1, 1, HEADS * WIDTH)
    with torch.no_grad():
        state = mixer.init_state(1).grow(2, k=k, v=v).replace(position=torch.tensor([65536]))
        shares = []
        for _ in range(60):
            alone = seconds(lambda: F.scaled_dot_product_attention(q, k, v))
            start = state

            def step(start=start) -> None:
                nonlocal state
                _, state = mixer.extend(x, start)

            shares.append(seconds(step) / alone)
    measured = statistics.median(shares)
    print(f"decoding: {measured:.2f} of one SDPA call over 65,536 keys")
    assert measured <= 1.3
