"""The Block Transformer against its definition, and its causality, padding, pieces and state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab.core.errors import UnsupportedError
from attnlab.models import create_model
from attnlab.models.block_transformer import BlockTransformer

D = torch.float64


def make(**options) -> BlockTransformer:
    torch.manual_seed(3)
    given = {"vocab_size": 7, "dim": 8, "block_depth": 2, "token_depth": 2, "num_heads": 2, "block_length": 4, "dtype": D}
    model = create_model("block_transformer", **(given | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def ids_of(n: int, batch: int = 2) -> Tensor:
    return torch.randint(7, (batch, n))


def norm(layer, x: Tensor) -> Tensor:
    return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5) * layer.weight + layer.bias


def decoder(blocks, rows: list[Tensor]) -> list[Tensor]:
    """Causal blocks, vector by vector."""
    for block in blocks:
        mixer, seen, after = block.mixer, [], []
        for row in rows:
            x = norm(block.mixer_norm, row)
            seen.append([list(p(x).chunk(mixer.num_heads)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)])
            heads = []
            for h in range(mixer.num_heads):
                query = seen[-1][0][h]
                weights = torch.stack([(query * one[1][h]).sum() / math.sqrt(len(query)) for one in seen]).softmax(0)
                heads.append(sum(w * one[2][h] for w, one in zip(weights, seen, strict=True)))
            row = row + mixer.out_proj(torch.cat(heads))
            hidden = block.channel_mixer.up(norm(block.channel_norm, row))
            after.append(row + block.channel_mixer.down(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))))
        rows = after
    return rows


def definition(model: BlockTransformer, ids: list[int]) -> Tensor:
    """The logits behind each id of one sequence, block by block, for mixers without positions."""
    length, logits = model.block_length, []
    padded = [model.pad] * (length - 1) + [model.lookup.weight[i] for i in ids]
    blocks = [torch.cat(padded[start : start + length]) for start in range(0, len(padded) - length + 1, length)]
    contexts = [norm(model.block_norm, c) for c in decoder(model.blocks, blocks)]
    for i, context in enumerate(contexts):
        own = [model.begin] + [model.embedding.weight[t] for t in ids[i * length + 1 : (i + 1) * length]]
        given = list(model.expand(context).split(model.dim))
        rows = given + own if model.conditioning == "prefix" else [a + b for a, b in zip(given, own, strict=False)]
        out = decoder(model.token_blocks, rows)[-len(own) :]
        head = model.embedding.weight if model.head is None else model.head.weight
        logits += [head @ norm(model.norm, row) for row in out]
    return torch.stack(logits)


@pytest.mark.tier("T2", "model:block_transformer")
@pytest.mark.parametrize(
    "options",
    [{}, {"num_prefix": 3, "block_length": 2, "tie_embeddings": True}, {"conditioning": "sum"}, {"block_length": 1}],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 7])
def test_equals_its_definition(options, n) -> None:
    model, ids = make(mixer_options={}, **options), ids_of(n)
    ours, theirs = model(ids), torch.stack([definition(model, one.tolist()) for one in ids])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    weight, leaves = torch.randn_like(ours), list(model.parameters())
    pairs = [torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True, materialize_grads=True) for y in (ours, theirs)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("conditioning", ["prefix", "sum"])
def test_no_logit_depends_on_a_later_token_and_all_earlier_ones_count(conditioning) -> None:
    model, ids = make(conditioning=conditioning), ids_of(11, batch=1)
    leaves = {}
    for name in ("lookup", "embedding"):
        leaves[name] = getattr(model, name)(ids).detach().requires_grad_()
        getattr(model, name).register_forward_hook(lambda *_, name=name: leaves[name])
    for t in range(11):
        gradients = torch.autograd.grad(model(ids)[0, t].square().sum(), list(leaves.values()), allow_unused=True)
        moved = sum(g[0].abs().amax(-1) for g in gradients if g is not None)
        assert float(moved[t + 1 :].sum()) == 0.0 and bool((moved[: t + 1] > 0).all())


@pytest.mark.parametrize("conditioning", ["prefix", "sum"])
@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("pieces", [(11,), (1,) * 9, (3, 1, 5), (4, 4, 2), (1, 7, 2, 4), (2, 6)], ids=str)
def test_pieces_equal_the_whole(pieces, length, conditioning) -> None:
    model, ids = make(conditioning=conditioning, block_length=length), ids_of(sum(pieces))
    state, logits = model.init_state(2), []
    for piece in ids.split(pieces, dim=1):
        y, state = model.extend(piece, state)
        logits.append(y)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids), rtol=1e-9, atol=1e-11)


def test_the_state_holds_a_key_a_block() -> None:
    model, ids = make(), ids_of(17)
    _, state = model.extend(ids, model.init_state(2))
    assert state["blocks.0.k"].shape[2] == 5 and state["ids"].shape[1] == 1
    _, state = model.extend(ids[:, :3], state)
    assert state["blocks.0.k"].shape[2] == 5 and state["ids"].shape[1] == 4


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_makes_no_difference(side) -> None:
    model, ids = make(), ids_of(9)
    keep = {"left": range(3, 9), "right": range(6), "inside": (0, 2, 3, 5, 6, 8)}[side]
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0] = True
    mask[1, list(keep)] = True
    y = model(ids, mask=mask)
    torch.testing.assert_close(y[0], model(ids[:1])[0])
    torch.testing.assert_close(y[1, list(keep)], model(ids[1:, list(keep)])[0])


def test_generation_with_a_state_is_that_without() -> None:
    model, prompt = make(), ids_of(3)
    found = model.generate(prompt, 9, temperature=0.0)
    for t in range(3, 12):
        assert torch.equal(found[:, t], model(found[:, :t])[:, -1].argmax(-1))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="block_length: expected a divisor"):
        make(block_length=3)
    with pytest.raises(ValueError, match="conditioning: expected one of"):
        make(conditioning="cross")
    with pytest.raises(ValueError, match="num_prefix: expected at least 1"):
        make(num_prefix=0)
    with pytest.raises(UnsupportedError):
        make(mixer="window")
