"""MemoryFormer's feed-forward block by its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab.channel_mixers import create_channel_mixer
from mixers.lookup import looked_up


@pytest.mark.tier("T2", "channel_mixer:memory")
@pytest.mark.parametrize("options", [{"tau": 4}, {"tau": 3, "extra_bits": 0, "hidden": 6, "weight": "prob"}])
def test_memory(options) -> None:
    mixer = create_channel_mixer("memory", 12, dtype=torch.float64, **options)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)

    def definition(token: Tensor) -> Tensor:
        inner = looked_up(mixer.up, token)
        spread = ((inner - inner.mean()).square().mean() + 1e-5).sqrt()
        return looked_up(mixer.down, (inner - inner.mean()) / spread * mixer.norm.weight + mixer.norm.bias)

    ours, theirs = mixer(x), torch.stack([torch.stack([definition(token) for token in example]) for example in x])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    weight, leaves = torch.randn_like(ours), [x, *mixer.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_widths_follow_the_chunks() -> None:
    mixer = create_channel_mixer("memory", 512, device="meta")
    assert mixer.hidden == 640
    assert mixer.up.tables.shape == (64, 256, 640)
    assert mixer.down.tables.shape == (64, 1024, 512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 5}, "tau: expected a divisor of the 12 channels"),
        ({"tau": 4, "hidden": 7}, r"hidden: expected a multiple of tau \+ extra_bits = 6"),
        ({"tau": 4, "extra_bits": -1}, "extra_bits >= 0"),
        ({"tau": 0}, "tau: expected 1 to 16"),
        ({"tau": 4, "weight": "l2"}, "weight: expected one of"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_channel_mixer("memory", 12, **options)
