"""FIT against its equations, and its causality, padding and groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import Tokens
from attnlab.models import create_model
from attnlab.models.embedding import sinusoids
from attnlab.models.local_latents import LocalLatents

D = torch.float64


def make(**options) -> LocalLatents:
    torch.manual_seed(3)
    given = {"dim": 4, "latent_dim": 6, "group": (3,), "num_latents": 2, "stages": ((1, 1), (1, 1))}
    model = create_model("local_latents", **(given | {"num_heads": 2, "latent_heads": 2, "dtype": D} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def norm(layer, x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * layer.weight + layer.bias


def attention(mixer, x: Tensor, y: Tensor, seen) -> Tensor:
    """Of the rows of x to those rows of y that ``seen`` gives for each."""
    heads = []
    projected = (mixer.q_proj(x), mixer.k_proj(y), mixer.v_proj(y))
    for q, k, v in zip(*(part.chunk(mixer.num_heads, -1) for part in projected), strict=True):
        rows = []
        for i, query in enumerate(q):
            weights = torch.stack([(query * k[j]).sum() / math.sqrt(len(query)) for j in seen(i)]).softmax(0)
            rows.append(sum(w * v[j] for w, j in zip(weights, seen(i), strict=True)))
        heads.append(torch.stack(rows))
    return mixer.out_proj(torch.cat(heads, -1))


def layers(blocks, x: Tensor, seen) -> Tensor:
    for block in blocks:
        h = norm(block.mixer_norm, x)
        x = x + attention(block.mixer, h, h, seen)
        hidden = block.channel_mixer.up(norm(block.channel_norm, x))
        x = x + block.channel_mixer.down(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
    return x


def cross(layer, x: Tensor, y: Tensor) -> Tensor:
    return x + attention(layer.mixer, norm(layer.norm, x), norm(layer.context_norm, y), lambda _: range(len(y)))


def definition(model: LocalLatents, x: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence, group by group."""
    groups, m = list(x.split(model.group[0])), model.num_latents
    places = sinusoids(torch.arange(len(groups))[None], model.latents.shape[1], D)[0]
    latents = [model.latents + place for place in places]
    for number, stage in enumerate(model.stages):
        groups = [layers(stage.tokens, g, lambda i, g=g: range(i + 1 if model.causal else len(g))) for g in groups]
        latents = [cross(stage.read, z, g) for z, g in zip(latents, groups, strict=True)]
        together = torch.cat(latents)
        count = len(together)
        together = layers(stage.latents, together, lambda i, n=count: range((i // m + 1) * m if model.causal else n))
        latents = list(together.split(m))
        if number + 1 < len(model.stages):
            sources = [None, *latents[:-1]] if model.causal else latents
            groups = [g if z is None else cross(stage.write, g, z) for g, z in zip(groups, sources, strict=True)]
    return norm(model.norm, torch.cat(groups)), norm(model.latents_norm, torch.stack(latents))


@pytest.mark.tier("T2", "model:local_latents")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "options"), [(6, {}), (8, {"stages": ((1, 0), (0, 2), (1, 1))}), (2, {"dim": 6, "latent_dim": 4})])
def test_equals_its_equations(n, options, causal) -> None:
    model = make(causal=causal, **options)
    x = torch.randn(2, n, model.norm.weight.shape[0], dtype=D, requires_grad=True)
    tokens = model(Tokens(x))
    theirs = [torch.stack(part) for part in zip(*(definition(model, one) for one in x), strict=True)]
    ours, leaves = [tokens.x, tokens.streams["latents"]], [x, *model.parameters()]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    weights = [torch.randn_like(part) for part in ours]
    totals = [sum((part * w).sum() for part, w in zip(pair, weights, strict=True)) for pair in (ours, theirs)]
    found = [torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True) for total in totals]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def reached(model: LocalLatents, n: int) -> Tensor:
    """Which input reaches which output, (outputs, inputs)."""
    x = torch.randn(1, n, 4, dtype=D, requires_grad=True)
    weight = torch.randn(4, dtype=D)
    y = model(Tokens(x)).x
    rows = [torch.autograd.grad((y[0, i] * weight).sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0 for i in range(n)]
    return torch.stack(rows)


def test_a_token_sees_all_before_it_and_none_behind_it() -> None:
    assert torch.equal(reached(make(causal=True), 8), torch.ones(8, 8, dtype=torch.bool).tril())
    assert bool(reached(make(), 8).all())
    alone = reached(make(stages=((1, 1),)), 8)
    assert torch.equal(alone, torch.arange(8)[:, None] // 3 == torch.arange(8) // 3)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_makes_no_difference(causal) -> None:
    model, x = make(causal=causal), torch.randn(2, 8, 4, dtype=D)
    mask = torch.arange(8)[None] < torch.tensor([[8], [4]])
    tokens = model(Tokens(x.masked_fill(~mask[..., None], float("nan")), mask))
    torch.testing.assert_close(tokens.x[0], model(Tokens(x[:1])).x[0])
    alone = model(Tokens(x[1:, :4]))
    torch.testing.assert_close(tokens.x[1, :4], alone.x[0])
    torch.testing.assert_close(tokens.streams["latents"][1, :2], alone.streams["latents"][0])
    assert bool((tokens.x[1, 4:] == 0).all()) and bool((tokens.streams["latents"][1, 2:] == 0).all())


def test_groups_of_a_grid_are_those_of_the_same_tokens_in_a_line() -> None:
    flat, model = make(group=(4,)), make(group=(2, 2))
    x = torch.randn(2, 16, 4, dtype=D)
    order = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).flatten()
    torch.testing.assert_close(model(Tokens(x, grid=(4, 4))).x[:, order], flat(Tokens(x[:, order])).x)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="group: expected positive sides"):
        make(group=(2, 2), causal=True)
    with pytest.raises(ValueError, match="num_latents: expected at least 1"):
        make(num_latents=0)
    with pytest.raises(ValueError, match="stages: expected at least one pair"):
        make(stages=())
    with pytest.raises(ValueError, match="tokens: expected a grid of rank 1"):
        make()(Tokens(torch.randn(1, 4, 4, dtype=D), grid=(2, 2)))
