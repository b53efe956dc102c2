"""The block of words and patches against its equations, padding, and what tells words apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import Tokens
from attnlab.models import create_model
from attnlab.models.two_level import TwoLevelBlock

D = torch.float64


def make(**options) -> TwoLevelBlock:
    torch.manual_seed(3)
    given = {"dim": 6, "inner_dim": 4, "words": (2, 2), "num_heads": 2, "inner_heads": 2, "dtype": D}
    block = create_model("two_level", **(given | options))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def streams(patches: int = 5, prefix: int = 1, m: int = 4, batch: int = 2) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, patches + prefix, 6, dtype=D, requires_grad=True)
    return x, torch.randn(batch, patches, m, 4, dtype=D, requires_grad=True)


def norm(layer, x: Tensor) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    weights = dict(layer.named_parameters())
    weight, bias = (next(v for k, v in weights.items() if k.endswith(kind)) for kind in ("weight", "bias"))
    return x * weight + bias


def attention(mixer, x: Tensor) -> Tensor:
    """Of the tokens (n, c) of one sequence, token by token."""
    heads = []
    for q, k, v in zip(*(p(x).chunk(mixer.num_heads, -1) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)), strict=True):
        rows = [torch.stack([(query * key).sum() / math.sqrt(len(query)) for key in k]).softmax(0) for query in q]
        heads.append(torch.stack([sum(w * value for w, value in zip(row, v, strict=True)) for row in rows]))
    return mixer.out_proj(torch.cat(heads, -1))


def mlp(layer, x: Tensor) -> Tensor:
    hidden = layer.up(x)
    return layer.down(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))


def definition(block: TwoLevelBlock, x: Tensor, words: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """One example."""
    after = []
    for y in words:
        y = y + attention(block.inner.mixer, norm(block.inner.mixer_norm, y))
        after.append(y + mlp(block.inner.channel_mixer, norm(block.inner.channel_norm, y)))
    rows = list(x)
    for p, y in enumerate(after):
        flat = torch.cat(list(y))
        rows[prefix + p] = rows[prefix + p] + norm(block.inject_norm, block.inject.weight @ norm(block.words_norm, flat))
    z = torch.stack(rows)
    z = z + attention(block.outer.mixer, norm(block.outer.mixer_norm, z))
    channel, normed = block.outer.channel_mixer, norm(block.outer.channel_norm, z)
    if hasattr(channel, "inside"):
        t = mlp(channel.inside, normed)
        t = t + t * torch.tanh(channel.up(torch.relu(channel.down(norm(channel.norm, t.mean(0))))))
    else:
        t = mlp(channel, normed)
    return z + t, torch.stack(after)


@pytest.mark.tier("T2", "model:two_level")
@pytest.mark.parametrize("options", [{}, {"squeeze": 0.5}], ids=str)
@pytest.mark.parametrize("prefix", [0, 1])
def test_equals_its_equations(options, prefix) -> None:
    block, (x, words) = make(**options), streams(prefix=prefix)
    tokens = block(Tokens(x, num_prefix=prefix, streams={"words": words}))
    examples = [definition(block, *one, prefix) for one in zip(x, words, strict=True)]
    theirs = [torch.stack(part) for part in zip(*examples, strict=True)]
    ours = [tokens.x, tokens.streams["words"]]
    leaves = [x, words, *block.parameters()]
    found = []
    for pair in (ours, theirs):
        found.append(torch.autograd.grad(sum((part**2).sum() for part in pair), leaves))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("squeeze", [None, 0.5])
def test_padding_makes_no_difference(squeeze) -> None:
    block, (x, words) = make(squeeze=squeeze), streams()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    poisoned = x.masked_fill(~mask[..., None], float("nan"))
    dirty = words.masked_fill(~mask[:, 1:, None, None], float("nan"))
    tokens = block(Tokens(poisoned, mask, num_prefix=1, streams={"words": dirty}))
    alone = block(Tokens(x[:1, :4], num_prefix=1, streams={"words": words[:1, :3]}))
    torch.testing.assert_close(tokens.x[:1, :4], alone.x)
    assert float(tokens.x[0, 4:].detach().abs().max()) == 0.0
    assert float(tokens.streams["words"][0, 3:].detach().abs().max()) == 0.0


def test_the_order_of_words_counts() -> None:
    block, (x, words) = make(), streams()
    tokens = block(Tokens(x, num_prefix=1, streams={"words": words}))
    turned = block(Tokens(x, num_prefix=1, streams={"words": words.flip(2)}))
    torch.testing.assert_close(turned.streams["words"].flip(2), tokens.streams["words"])
    assert not torch.allclose(turned.x, tokens.x)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="words: expected positive sides"):
        make(words=(0, 2))
    with pytest.raises(ValueError, match="squeeze: expected a ratio"):
        make(squeeze=0.1)
    x, words = streams()
    with pytest.raises(ValueError, match="expected a stream 'words'"):
        make()(Tokens(x, num_prefix=1))
    with pytest.raises(ValueError, match="expected a stream 'words'"):
        make()(Tokens(x, streams={"words": words}))
