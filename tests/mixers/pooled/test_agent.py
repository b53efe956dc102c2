"""Agent attention in all its forms by its definition, as linear attention, and in the place of trained attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnlab
from attnlab import create_mixer, record
from attnlab.mixers.pooled.agent import AgentAttention
from attnlab.ops.linear_attention import linear_attention
from mixers.definition import assert_defined_by, build, split_heads, tokens

DIM, HEADS, D = 12, 3, 4


class _FirstTokens(nn.Module):
    """The first two queries as agents, if they are real."""

    def forward(self, q, mask, grid):
        return q[:, :, :2], None if mask is None else mask[:, :2]


def _bias(part, h: int, grid: tuple[int, int]) -> Tensor:
    """(a, tokens) of one head, the prefix in front."""
    rows = []
    for a in range(part.block.shape[1]):
        block = F.interpolate(part.block[h, a][None, None], size=grid, mode="bilinear", align_corners=False)[0, 0]
        cells = torch.stack([block[r, c] + part.rows[h, a, r, 0] + part.columns[h, a, 0, c]
                             for r in range(grid[0]) for c in range(grid[1])])  # fmt: skip
        rows.append(cells if part.prefix is None else torch.cat((part.prefix[h, a], cells)))
    return torch.stack(rows)


def _two_steps(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, b1: Tensor | float, b2: Tensor | float) -> Tensor:
    """One head of one example, every weight by itself."""
    first = [[torch.exp((a @ key) / D**0.5 + _at(b1, i, j)) for j, key in enumerate(k)] for i, a in enumerate(agents)]
    summary = [sum(w * value for w, value in zip(row, v, strict=True)) / sum(row) for row in first]
    out = []
    for i, query in enumerate(q):
        row = [torch.exp((query @ a) / D**0.5 + _at(b2, j, i)) for j, a in enumerate(agents)]
        out.append(sum(w * s for w, s in zip(row, summary, strict=True)) / sum(row))
    return torch.stack(out)


def _at(bias: Tensor | float, i: int, j: int) -> Tensor | float:
    return bias[i, j] if isinstance(bias, Tensor) else bias


def _quarters(image: Tensor) -> Tensor:
    """Means of the four quarters of (rows, columns, c) with even sides."""
    r, c = image.shape[0] // 2, image.shape[1] // 2
    return torch.stack([image[i * r : i * r + r, j * c : j * c + c].mean((0, 1)) for i in range(2) for j in range(2)])


@pytest.mark.tier("T2", "mixer:agent")
def test_class_token_with_biases() -> None:
    grid = (4, 2)
    mixer = build("agent", DIM, HEADS, num_agents=4, bias_grid=grid, class_token=True, qkv_bias=True)

    def definition(x: Tensor) -> Tensor:
        out = []
        for example in x:
            q, k, v = mixer.q_proj(example), mixer.k_proj(example), mixer.v_proj(example)
            agents = _quarters(q[1:].view(*grid, DIM))
            heads = [
                _two_steps(*parts, _bias(mixer.key_bias, h, grid), _bias(mixer.query_bias, h, grid))
                for h, parts in enumerate(zip(*(split_heads(t, HEADS) for t in (q, k, v, agents)), strict=True))
            ]
            image = v[1:].T.view(1, DIM, *grid)
            local = F.conv2d(image, mixer.dwc.weight, mixer.dwc.bias, padding=1, groups=DIM)[0].flatten(1).T
            out.append(mixer.out_proj(torch.cat(heads, -1) + torch.cat((torch.zeros(1, DIM, dtype=x.dtype), local))))
        return torch.stack(out)

    assert_defined_by(mixer, definition, tokens(9, DIM))


@pytest.mark.tier("T2", "mixer:agent")
def test_reduced_keys_with_biases() -> None:
    grid = (4, 4)
    mixer = build("agent", DIM, HEADS, num_agents=4, bias_grid=grid, reduction=2)

    def definition(x: Tensor) -> Tensor:
        out = []
        for example in x:
            image = example.T.view(1, DIM, *grid)
            small = F.conv2d(image, mixer.shrink.weight, mixer.shrink.bias, stride=2)[0].flatten(1).T
            small = F.layer_norm(small, (DIM,), mixer.shrink_norm.weight, mixer.shrink_norm.bias)
            q, k, v = mixer.q_proj(example), mixer.k_proj(small), mixer.v_proj(small)
            agents = _quarters(q.view(*grid, DIM))
            heads = [
                _two_steps(*parts, _bias(mixer.key_bias, h, (2, 2)), _bias(mixer.query_bias, h, grid))
                for h, parts in enumerate(zip(*(split_heads(t, HEADS) for t in (q, k, v, agents)), strict=True))
            ]
            large = F.interpolate(v.T.view(1, DIM, 2, 2), size=grid, mode="bilinear", align_corners=False)
            local = F.conv2d(large, mixer.dwc.weight, mixer.dwc.bias, padding=1, groups=DIM)[0].flatten(1).T
            out.append(mixer.out_proj(torch.cat(heads, -1) + local))
        return torch.stack(out)

    assert_defined_by(mixer, definition, tokens(16, DIM), grid=grid)


@pytest.mark.tier("T2", "mixer:agent")
@pytest.mark.parametrize("source", ["learned", "given"])
@pytest.mark.parametrize("value_scale", [0.0, 0.3])
def test_other_agents_and_values_in_place_of_the_convolution(source, value_scale) -> None:
    agents = _FirstTokens() if source == "given" else "learned"
    mixer = build("agent", DIM, HEADS, num_agents=2, agents=agents, dwc=False, value_scale=value_scale)

    def definition(x: Tensor) -> Tensor:
        out = []
        for example in x:
            q, k, v = (split_heads(layer(example), HEADS) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            heads = []
            for h in range(HEADS):
                chosen = mixer.agents.tokens[h] if source == "learned" else q[h][:2]
                heads.append(_two_steps(q[h], k[h], v[h], chosen, 0.0, 0.0) + value_scale * v[h])
            out.append(mixer.out_proj(torch.cat(heads, -1)))
        return torch.stack(out)

    x = tokens(6, DIM)
    assert_defined_by(mixer, definition, x)
    with record(mixer) as tape:
        mixer(x)
    matrix = mixer.mixing_matrix(x)
    torch.testing.assert_close(matrix.sum(-1), torch.full_like(matrix[..., 0], 1 + value_scale))
    torch.testing.assert_close(matrix, tape["attention"])
    torch.testing.assert_close(matrix @ tape["values"], tape["mixed"])


@pytest.mark.parametrize("agents", ["pool", "learned"])
def test_it_is_linear_attention_with_softmax_features(agents) -> None:
    mixer = build("agent", DIM, HEADS, num_agents=4, agents=agents, dwc=False)
    x = tokens(10, DIM)
    q, k, v = mixer.project(x)
    of, _ = mixer.agents(q, None, (10,))
    read = torch.softmax(q @ of.mT / D**0.5, dim=-1)
    written = torch.softmax(of @ k.mT / D**0.5, dim=-1).mT
    heads, _ = linear_attention(read, written, v, causal=False)
    torch.testing.assert_close(mixer(x), mixer.out_proj(heads.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(mixer.mixing_matrix(x), read @ written.mT)
    # the features of the queries sum to 1, those of the keys over the keys: no denominator is left to divide by
    torch.testing.assert_close(read @ written.sum(2, keepdim=True).mT, torch.ones_like(read[..., :1]))


def test_in_the_place_of_trained_attention() -> None:
    trained = build("softmax", DIM, HEADS, qkv_bias=True).eval()
    own = AgentAttention.from_attention(trained, num_agents=9, value_scale=0.0)
    x = tokens(9, DIM).detach()
    assert not own.training and own.dwc is None and own.q_proj.weight.dtype == torch.float64
    assert torch.equal(own.project(x)[0], trained.project(x)[0])
    alike = x[:, :1].expand(-1, 9, -1)  # equal tokens: both give every query the one value
    torch.testing.assert_close(own(alike), trained(alike))
    more = AgentAttention.from_attention(trained, num_agents=9)
    _, _, v = trained.project(x)
    extra = F.linear(0.075 * v.transpose(1, 2).flatten(2), trained.out_proj.weight)
    torch.testing.assert_close(more(x), own(x) + extra)


@pytest.mark.parametrize("options", [{"causal": True}, {"position": "rotary"}, {"qk_norm": "layer_norm"}, {"num_kv_heads": 1}])
def test_attention_that_it_cannot_replace(options) -> None:
    with pytest.raises(ValueError, match=r"mixer|num_kv_heads"):
        AgentAttention.from_attention(create_mixer("softmax", DIM, HEADS, **options))


@pytest.mark.parametrize(
    "options",
    [{"agents": "learned", "dwc": False}, {"agents": "learned"}, {"agents": _FirstTokens(), "num_agents": 2},
     {"value_scale": 0.1, "dwc": False}],
    ids=["learned", "learned, local", "given", "values"],
)  # fmt: skip
def test_the_contract_in_other_forms(options) -> None:
    report = attnlab.check("agent", options=options)
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"agents": "none"}, "agents"), ({"value_scale": 0.1, "reduction": 2}, "value_scale")],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("agent", DIM, HEADS, **options)
