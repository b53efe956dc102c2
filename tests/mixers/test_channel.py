"""Channel group attention by its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens


@pytest.mark.tier("T2", "mixer:channel_group")
@pytest.mark.parametrize("scale", ["width", "tokens"])
def test_channel_group(scale) -> None:
    mixer = build("channel_group", scale=scale)

    def definition(x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, 3) for part in mixer.in_proj(x).chunk(3, -1))
        s = 4**-0.5 if scale == "width" else 9**-0.5
        outputs = []
        for g in range(3):
            o = torch.zeros_like(q[g])
            for b in range(x.shape[0]):
                for a in range(4):
                    weights = torch.softmax(torch.stack([(k[g][b, :, a] * v[g][b, :, c]).sum() * s for c in range(4)]), 0)
                    o[b, :, a] = q[g][b] @ weights
            outputs.append(o)
        return mixer.out_proj(torch.cat(outputs, -1))

    assert_defined_by(mixer, definition, tokens())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("channel_group", {"scale": "heads"}, "scale"),
    ],
)
def test_bad_options(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 3, **options)
