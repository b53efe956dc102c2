"""Pair-wise cross-attention by its definition, and global-local cross-attention put together from its parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attnlab import Tokens, create_mixer, create_reducer, record
from attnlab.mixers.cross.pair_wise import draw_partners, pair_wise_branch
from attnlab.ops.maps.rollout import rollout
from mixers.definition import assert_defined_by, build, split_heads, tokens

H, DIM = 3, 12
MASK = torch.tensor([[True, True, False, True], [False, True, True, False], [True] * 4])


def _definition(mixer, x: Tensor, mask: Tensor, partners: list[int] | None) -> Tensor:
    x = x * mask[..., None]
    q, k, v = (split_heads(layer(x), H) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    out = []
    for b in range(len(x)):
        sources = [b] if partners is None else [b, partners[b]]
        keys = [(e, t) for e in sources for t in range(x.shape[1]) if mask[e, t]]
        rows = []
        for t in range(x.shape[1]):
            heads = []
            for h in range(H):
                logits = torch.stack([q[h][b, t] @ k[h][key] / math.sqrt(DIM // H) for key in keys])
                heads.append(sum(w * v[h][key] for w, key in zip(logits.softmax(0), keys, strict=True)))
            rows.append(mixer.out_proj(torch.cat(heads)) * mask[b, t])
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.tier("T2", "mixer:pair_wise")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_pair_wise(masked, train) -> None:
    mixer = build("pair_wise", DIM, H, generator=torch.Generator().manual_seed(2)).train(train)
    mask = MASK if masked else torch.ones_like(MASK)
    x = tokens(4, batch=3)
    if train:
        mixer(x)
        mixer.hold(mixer.partners)
    partners = mixer.partners.tolist() if train else None
    assert_defined_by(mixer, lambda x: _definition(mixer, x, mask, partners), x, mask=mask if masked else None)


def test_partners_are_others_and_every_one_comes_once() -> None:
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(60):
        partners = draw_partners(4, generator=generator).tolist()
        assert sorted(partners) == [0, 1, 2, 3]
        assert all(b != p for b, p in enumerate(partners))
        seen.add(tuple(partners))
    assert len(seen) == 6  # the cycles of four
    assert draw_partners(1).tolist() == [0]


def test_a_branch_has_the_same_partners_in_every_block() -> None:
    model = nn.Sequential(*(build("pair_wise", DIM, H) for _ in range(2))).train()
    x, partners = tokens(4, batch=3), torch.tensor([1, 2, 0])
    with record(model, only=["partners"]) as tape, pair_wise_branch(model, partners):
        paired = model(x)
    assert all(torch.equal(found[0], partners) for found in tape.items.values())
    assert len(tape.items) == 2
    with pair_wise_branch(model, None):
        alone = model(x)
    assert torch.equal(alone, model.eval()(x))
    assert float((paired - alone).detach().abs().max()) > 1e-3
    with pytest.raises(ValueError, match="pair_wise"), pair_wise_branch(nn.Linear(2, 2), None):
        pass


def test_a_partner_evens_attention_out() -> None:
    mixer = build("pair_wise", DIM, H).train()
    x = tokens(6, batch=4).detach()
    mixer(x)
    paired = mixer.mixing_matrix(x).detach()
    own = mixer.eval().mixing_matrix(x).detach()
    assert paired.shape == (4, H, 6, 12)
    entropy = [-(m.masked_fill(m == 0, 1.0).log() * m).sum(-1).mean() for m in (paired, own)]
    assert float(entropy[0]) > float(entropy[1])


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="position"):
        create_mixer("pair_wise", DIM, H, position="alibi")
    mixer = build("pair_wise", DIM, H)
    mixer.hold(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="partners"):
        mixer(tokens(4, batch=3))


def test_global_local_cross_attention_is_a_mixer_on_salient_tokens() -> None:
    """Queries of the class token and the selected ones, keys and values of all tokens."""
    blocks = nn.Sequential(*(build("softmax", DIM, H) for _ in range(2)))
    x = tokens(9).detach()
    with record(blocks, only=["attention"]) as tape:
        y = blocks(x)
    maps = rollout([tape["0/attention"], tape["1/attention"]])
    salient = create_reducer("salient_tokens", DIM, ratio=0.3)(Tokens(y, num_prefix=1, streams={"rollout": maps}))
    best = sorted(sorted(range(1, 9), key=lambda t: -float(maps[0, 0, t].detach()))[:3])
    torch.testing.assert_close(salient.x[0], y[0, [0, *best]])
    last = build("softmax", DIM, H)
    local = last(salient.x, y)
    torch.testing.assert_close(local[0], last(y)[0, [0, *best]])
