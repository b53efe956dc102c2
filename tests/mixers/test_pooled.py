"""Agent attention by its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import UnsupportedError, create_mixer, record
from mixers.definition import assert_defined_by, build, split_heads, tokens


@pytest.mark.tier("T2", "mixer:agent")
@pytest.mark.parametrize("bias", [False, True])
def test_agent_on_a_grid(bias) -> None:
    grid = (4, 6)
    mixer = build("agent", num_agents=4, bias_grid=grid if bias else None)

    def definition(x: Tensor) -> Tensor:
        q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
        image = q.view(2, *grid, 12)
        agents = torch.stack([image[:, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3].mean((1, 2)) for r in range(2) for c in range(2)], 1)
        heads = []
        for h, (a, qh, kh, vh) in enumerate(zip(*(split_heads(t, 3) for t in (agents, q, k, v)), strict=True)):
            first, second = torch.zeros(4, 24, dtype=x.dtype), torch.zeros(24, 4, dtype=x.dtype)
            if bias:
                for part, store in ((mixer.key_bias, "first"), (mixer.query_bias, "second")):
                    block = F.interpolate(part.block[h][None], size=grid, mode="bilinear", align_corners=False)[0]
                    total = (block + part.rows[h] + part.columns[h]).flatten(1)
                    first, second = (total, second) if store == "first" else (first, total.T)
            summary = torch.softmax(a @ kh.transpose(1, 2) / 2.0 + first, -1) @ vh
            heads.append(torch.softmax(qh @ a.transpose(1, 2) / 2.0 + second, -1) @ summary)
        local = F.conv2d(v.transpose(1, 2).view(2, 12, *grid), mixer.dwc.weight, mixer.dwc.bias, padding=1, groups=12)
        return mixer.out_proj(torch.cat(heads, -1) + local.flatten(2).transpose(1, 2))

    assert_defined_by(mixer, definition, tokens(24), grid=grid)


def test_agent_segments_are_those_of_the_real_tokens() -> None:
    mixer = build("agent", num_agents=3, dwc=False)
    x = tokens(11).detach()
    mask = torch.tensor([[False, True, True, True, False, True, True, False, True, True, False]]).expand(2, -1)
    torch.testing.assert_close(mixer(x, mask=mask)[mask].view(2, 7, 12), mixer(x[mask].view(2, 7, 12)))


def test_agent_equals_linear_attention_with_softmax_features() -> None:
    mixer = build("agent", num_agents=4, dwc=False)
    x = tokens(8).detach()
    with record(mixer) as tape:
        mixer(x)
    matrix = mixer.mixing_matrix(x)
    assert torch.linalg.matrix_rank(matrix[0, 0]) <= 4
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    torch.testing.assert_close(matrix @ tape["values"], tape["mixed"])


def test_agent_refuses() -> None:
    with pytest.raises(UnsupportedError, match="future"):
        create_mixer("agent", 8, 2, causal=True)
    with pytest.raises(UnsupportedError, match="bias_grid"):
        build("agent", num_agents=4, bias_grid=(2, 3))(tokens(8), grid=(2, 4))
    with pytest.raises(ValueError, match="square"):
        build("agent", num_agents=3)(tokens(8), grid=(2, 4))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("agent", {"num_agents": 0}, "num_agents"),
        ("agent", {"num_kv_heads": 1}, "num_kv_heads"),
        ("agent", {"head_dim": 8}, "head_dim"),
        ("agent", {"position": "alibi"}, "position"),
        ("agent", {"class_token": True, "reduction": 2}, "reduction"),
    ],
)
def test_bad_options(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 3, **options)
