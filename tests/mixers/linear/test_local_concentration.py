"""The local concentration module by its definition, in training and evaluation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens

GRID = (3, 4)


def _definition(mixer, x: Tensor, mask: Tensor, training: bool) -> Tensor:
    """Real tokens in a list for the norm; everything else zero before each convolution."""

    def convolve(t: Tensor, conv: torch.nn.Module) -> Tensor:
        image = (t * mask[..., None]).mT.unflatten(-1, GRID)
        return F.conv2d(image, conv.weight, conv.bias, padding=1, groups=t.shape[-1]).flatten(2).mT

    y, norm = F.gelu(convolve(x, mixer.first)), mixer.norm
    real = y[mask]
    mean, variance = (real.mean(0), real.var(0, unbiased=False)) if training else (norm.running_mean, norm.running_var)
    y = (y - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    return convolve(y, mixer.second) * mask[..., None]


@pytest.mark.tier("T2", "mixer:local_concentration")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_local_concentration(training, masked) -> None:
    mixer = build("local_concentration", 4, 1, kernel_size=3).train(training)
    torch.nn.init.uniform_(mixer.norm.running_var, 0.5, 2.0)
    mask = torch.ones(2, 12, dtype=torch.bool)
    if masked:
        mask[0, 3] = mask[0, 7] = mask[1, 0] = False
    given = {"mask": mask} if masked else {}
    assert_defined_by(mixer, lambda x: _definition(mixer, x, mask, training), tokens(12, 4), grid=GRID, **given)


def test_running_means_are_those_of_real_tokens() -> None:
    mixer, x = build("local_concentration", 4, 1, kernel_size=3).train(), tokens(12, 4).detach()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 5:] = False
    mixer(x, mask=mask, grid=GRID)
    image = (x * mask[..., None]).mT.unflatten(-1, GRID)
    real = F.gelu(F.conv2d(image, mixer.first.weight, mixer.first.bias, padding=1, groups=4)).flatten(2).mT[mask]
    torch.testing.assert_close(mixer.norm.running_mean, 0.1 * real.mean(0))
    torch.testing.assert_close(mixer.norm.running_var, 0.9 + 0.1 * real.var(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kernel_size": 4}, "kernel_size: expected an odd number"), ({"rank": 3}, "rank: expected 1 or 2")],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("local_concentration", 4, 1, **options)
