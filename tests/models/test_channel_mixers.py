from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnlab.channel_mixers import create_channel_mixer, list_channel_mixers
from attnlab.core.errors import UnknownNameError
from attnlab.models import count_parameters

D = torch.float64


def test_the_listed_ones():
    assert {"mlp", "glu", "swiglu"} <= set(list_channel_mixers())


def test_mlp_is_its_equation_with_the_exact_gelu():
    mlp = create_channel_mixer("mlp", 6, dtype=D)
    x = torch.randn(2, 3, 6, dtype=D)
    up = x @ mlp.up.weight.T + mlp.up.bias
    expected = (up * 0.5 * (1 + torch.erf(up / 2**0.5))) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)
    assert mlp.hidden == 24


@pytest.mark.parametrize(
    ("name", "options", "gate"),
    [("swiglu", {}, F.silu), ("glu", {}, torch.sigmoid), ("glu", {"activation": "identity", "bias": True}, lambda x: x)],
)
def test_gated_units_are_their_equation(name, options, gate):
    glu = create_channel_mixer(name, 6, hidden=5, dtype=D, **options)
    x = torch.randn(2, 3, 6, dtype=D)
    inner = F.linear(x, glu.up.weight, glu.up.bias)
    expected = F.linear(gate(inner[..., :5]) * inner[..., 5:], glu.down.weight, glu.down.bias)
    torch.testing.assert_close(glu(x), expected, rtol=1e-12, atol=1e-12)


def test_the_default_widths_cost_the_same():
    mlp, swiglu = (create_channel_mixer(name, 96, bias=False, device="meta") for name in ("mlp", "swiglu"))
    assert count_parameters(mlp) == count_parameters(swiglu) == 8 * 96**2


def test_bad_options_are_named():
    with pytest.raises(UnknownNameError, match="'swiglu'"):
        create_channel_mixer("swigl", 8)
    with pytest.raises(UnknownNameError, match=r"activation: .*'sigmod'; did you mean 'sigmoid'"):
        create_channel_mixer("glu", 8, activation="sigmod")
    with pytest.raises(ValueError, match="hidden: expected a positive integer, got 0"):
        create_channel_mixer("mlp", 8, hidden=0)
