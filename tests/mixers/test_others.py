"""Mamba, windows, agents, channel groups, focal modulation and pooling by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import UnsupportedError, create_mixer, record
from mixers.definition import assert_defined_by, build, split_heads, tokens


@pytest.mark.tier("T2", "mixer:mamba")
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "conv_bias": False, "dt_rank": 3, "conv_size": 2}], ids=["default", "options"]
)
def test_mamba(options) -> None:
    mixer = build("mamba", 8, 1, state_dim=3, **options)

    def definition(u: Tensor) -> Tensor:
        x, z = mixer.in_proj(u).split(16, -1)
        weight, width = mixer.conv.weight, mixer.conv.weight.shape[1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        x = sum(weight[:, s] * padded[:, s : s + u.shape[1]] for s in range(width))
        x = F.silu(x if mixer.conv.bias is None else x + mixer.conv.bias)
        r, b, c = mixer.x_proj(x).split([mixer.dt_rank, 3, 3], -1)
        dt = F.softplus(mixer.dt_proj(r))
        a = -torch.exp(mixer.A_log)
        h = torch.zeros(u.shape[0], 16, 3, dtype=u.dtype)
        rows = []
        for t in range(u.shape[1]):
            h = torch.exp(dt[:, t, :, None] * a) * h + dt[:, t, :, None] * b[:, t, None, :] * x[:, t, :, None]
            rows.append((h * c[:, t, None, :]).sum(-1) + mixer.D * x[:, t])
        return mixer.out_proj(torch.stack(rows, 1) * F.silu(z))

    assert_defined_by(mixer, definition, tokens(7, 8))


def test_mamba_initialisation() -> None:
    mixer = create_mixer("mamba", 32, state_dim=4)
    torch.testing.assert_close(-mixer.A_log.exp(), -torch.arange(1.0, 5.0).expand(64, -1))
    step = F.softplus(mixer.dt_proj.bias.detach())
    assert float(step.min()) >= 1e-3 * 0.999
    assert float(step.max()) <= 0.1 * 1.001
    assert all(getattr(p, "_no_weight_decay", False) for p in (mixer.A_log, mixer.D, mixer.dt_proj.bias))
    assert mixer.dt_rank == 2


def _masked_softmax_attention(mixer, x: Tensor, allowed: Tensor) -> Tensor:
    heads = []
    for q, k, v in zip(*(split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)), strict=True):
        logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        heads.append(torch.softmax(logits.masked_fill(~allowed, float("-inf")), -1) @ v)
    return mixer.out_proj(torch.cat(heads, -1))


@pytest.mark.tier("T2", "mixer:sliding_window")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (4, 2), (50, 3)])
def test_sliding_window(causal, window, sinks) -> None:
    mixer = build("sliding_window", causal=causal, window=window, num_sinks=sinks)
    n = 13
    allowed = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            near = i - window < j <= i if causal else abs(i - j) <= window // 2
            allowed[i, j] = near or (j < sinks and (not causal or j <= i) and j <= i + (0 if causal else window // 2))
    assert_defined_by(mixer, lambda x: _masked_softmax_attention(mixer, x, allowed), tokens(n))


def test_sliding_window_state_is_bounded() -> None:
    mixer = create_mixer("sliding_window", 8, 2, causal=True, window=4, num_sinks=2)
    state = mixer.init_state(1)
    for _ in range(12):
        _, state = mixer.extend(torch.randn(1, 1, 8), state)
    assert state["k"].shape == (1, 2, 5, 4)
    assert int(state["position"]) == 12


@pytest.mark.tier("T2", "mixer:window")
@pytest.mark.parametrize("grid", [(4, 6), (5, 5), (7,), (2, 3, 4)])
def test_window(grid) -> None:
    mixer = build("window", window=2)
    n = math.prod(grid)
    cells = torch.stack(torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij"), -1).reshape(n, -1) // 2
    allowed = (cells[:, None] == cells[None]).all(-1)
    assert_defined_by(mixer, lambda x: _masked_softmax_attention(mixer, x, allowed), tokens(n), grid=grid)


def test_zero_tokens_at_the_border_take_part() -> None:
    masked, zeros = (build("window", window=3, border=border, qkv_bias=True) for border in ("masked", "zero_tokens"))
    zeros.load_state_dict(masked.state_dict())
    x = tokens(4)
    padded = F.pad(x.view(2, 2, 2, 12), (0, 0, 0, 1, 0, 1)).view(2, 9, 12)
    torch.testing.assert_close(zeros(x, grid=(2, 2)), masked(padded, grid=(3, 3))[:, [0, 1, 3, 4]])
    assert not torch.allclose(zeros(x, grid=(2, 2)), masked(x, grid=(2, 2)))


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


@pytest.mark.tier("T2", "mixer:focal_modulation")
@pytest.mark.parametrize("options", [{}, {"levels": 3, "normalize": True, "post_norm": True}], ids=["default", "options"])
def test_focal_modulation(options) -> None:
    mixer, grid = build("focal_modulation", 6, 1, **options), (4, 5)
    levels = options.get("levels", 2)

    def definition(x: Tensor) -> Tensor:
        q, c, g = mixer.in_proj(x).split([6, 6, levels + 1], -1)
        c = c.transpose(1, 2).view(2, 6, *grid)
        gates = g.transpose(1, 2).view(2, levels + 1, *grid)
        context = torch.zeros_like(c)
        for level in range(levels):
            side = 3 + 2 * level
            c = F.gelu(F.conv2d(c, mixer.kernels[level], padding=side // 2, groups=6))
            context = context + gates[:, level : level + 1] * c
        context = context + gates[:, levels:] * F.gelu(c.mean((2, 3), keepdim=True))
        context = context / (levels + 1) if options.get("normalize") else context
        y = q * mixer.modulate(context.flatten(2).transpose(1, 2))
        return mixer.out_proj(
            F.layer_norm(y, (6,), mixer.post_norm.weight, mixer.post_norm.bias) if options.get("post_norm") else y
        )

    assert_defined_by(mixer, definition, tokens(20, 6), grid=grid)


@pytest.mark.tier("T2", "mixer:pooling")
@pytest.mark.parametrize("grid", [(9,), (3, 4), (2, 3, 2)])
def test_pooling(grid) -> None:
    mixer = build("pooling", size=3)
    n = math.prod(grid)
    cells = torch.stack(torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij"), -1).reshape(n, -1)
    near = ((cells[:, None] - cells[None]).abs().amax(-1) <= 1).double()

    def definition(x: Tensor) -> Tensor:
        return (near @ x) / near.sum(-1, keepdim=True) - x

    assert_defined_by(mixer, definition, tokens(n), grid=grid)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mamba", {"state_dim": 0}, "state_dim"),
        ("sliding_window", {"window": 0}, "window"),
        ("sliding_window", {"num_sinks": -1}, "num_sinks"),
        ("sliding_window", {"position": "alibi"}, "position"),
        ("window", {"border": "wrap"}, "border"),
        ("agent", {"num_agents": 0}, "num_agents"),
        ("channel_group", {"scale": "heads"}, "scale"),
        ("focal_modulation", {"window": 4}, "odd window"),
        ("pooling", {"size": 2}, "size"),
    ],
)
def test_bad_options(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 3, **options)
