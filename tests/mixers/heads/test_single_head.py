"""Single-head attention by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens


def _definition(mixer, x: Tensor, mask: Tensor, training: bool) -> Tensor:
    p, d = mixer.attended, mixer.key_dim
    real = [[i for i in range(x.shape[1]) if mask[e, i]] for e in range(x.shape[0])]
    where = [(e, i) for e, members in enumerate(real) for i in members]

    def norm(rows: list[Tensor], part) -> dict:
        mean, variance = part.norm.running_mean, part.norm.running_var
        if training:
            mean = sum(rows) / len(rows)
            variance = sum((row - mean) ** 2 for row in rows) / len(rows)
        rows = [(row - mean) / torch.sqrt(variance + 1e-5) * part.norm.weight + part.norm.bias for row in rows]
        return dict(zip(where, rows, strict=True))

    def normal(e: int, i: int) -> Tensor:
        slices = torch.stack([x[e, j, :p] for j in real[e]])
        spread = torch.sqrt(((slices - slices.mean()) ** 2).mean() + 1e-5)
        return (x[e, i, :p] - slices.mean()) / spread * mixer.norm.weight + mixer.norm.bias

    qkv = norm([mixer.qkv.conv.weight[:, :, 0] @ normal(e, i) for e, i in where], mixer.qkv)
    joined = []
    for e, i in where:
        logits = torch.stack([qkv[e, i][:d] @ qkv[e, j][d : 2 * d] for j in real[e]]) / math.sqrt(d)
        shares = logits.exp() / logits.exp().sum()
        read = sum(share * qkv[e, j][2 * d :] for share, j in zip(shares, real[e], strict=True))
        joined.append(torch.relu(torch.cat((read, x[e, i, p:]))))
    rows = norm([mixer.out_proj.conv.weight[:, :, 0] @ row for row in joined], mixer.out_proj)
    zero = torch.zeros(x.shape[2], dtype=x.dtype)
    return torch.stack([torch.stack([rows.get((e, i), zero) for i in range(x.shape[1])]) for e in range(x.shape[0])])


@pytest.mark.tier("T2", "mixer:single_head")
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("masked", [False, True])
def test_single_head(masked, training) -> None:
    mixer = build("single_head", 10, 1, attended=4, key_dim=3, out_scale=1.0).train(training)
    mask = torch.ones(2, 6, dtype=torch.bool)
    if masked:
        mask[0, 4:] = mask[1, 1] = False
    given = {"mask": mask} if masked else {}
    assert_defined_by(mixer, lambda x: _definition(mixer, x, mask, training), tokens(6, 10), **given, grid=(2, 3))


def test_the_rest_of_the_channels_passes_by() -> None:
    mixer = build("single_head", 8, 1, attended=3, out_scale=1.0).eval()
    x = tokens(5, 8)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 2].sum(), x)
    assert (gradient[0, [0, 1, 3, 4], 3:] == 0).all()
    assert float(gradient[0, [0, 1, 3, 4], :3].abs().min()) > 0


@pytest.mark.parametrize(("dim", "attended"), [(224, 48), (308, 66), (320, 68), (352, 75), (448, 96)])
def test_default_widths_are_those_of_the_named_models(dim, attended) -> None:
    assert create_mixer("single_head", dim).attended == attended


def test_a_new_one_adds_nothing() -> None:
    assert (create_mixer("single_head", 8)(torch.randn(1, 9, 8)) == 0).all()


@pytest.mark.parametrize(("options", "message"), [({"attended": 13}, "attended"), ({"key_dim": 0}, "key_dim")])
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("single_head", 12, **options)
