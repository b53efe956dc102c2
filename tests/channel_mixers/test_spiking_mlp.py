"""The spiking perceptron by its definition."""

from __future__ import annotations

import pytest
import torch

from attnlab.channel_mixers import create_channel_mixer
from mixers.spiking_oracle import disturb, fire, layer


@pytest.mark.tier("T2", "channel_mixer:spiking_mlp")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_spiking_mlp(train, masked) -> None:
    mixer = create_channel_mixer("spiking_mlp", 6, hidden=10, threshold=0.5, num_steps=3, dtype=torch.float64).train(train)
    disturb(mixer)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, real = torch.randn(2, 8, 6, dtype=torch.float64), torch.ones(2, 8, dtype=torch.bool)
    if masked:
        real[0, 5:] = real[1, 0] = False
        x = x.masked_fill(~real.unsqueeze(-1), 0.0)
    x.requires_grad_()
    ours = mixer(x, mask=real if masked else None)
    inner = fire(layer(mixer.up, torch.stack([x] * 3), real), 0.5)
    theirs = fire(layer(mixer.down, inner, real), 0.5).mean(0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert 0.05 < float(ours.detach().mean()) < 0.95
    weight, leaves = torch.randn_like(ours), [x, *mixer.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_defaults_and_what_they_are_for() -> None:
    mixer = create_channel_mixer("spiking_mlp", 8)
    assert mixer.hidden == 32
    assert not mixer.per_token
    with pytest.raises(ValueError, match="num_steps: expected a positive number"):
        create_channel_mixer("spiking_mlp", 8, num_steps=0)
