"""MorpMamba by its definition, and its parts by theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import check, create_mixer
from attnlab.mixers.parts.linear_recurrence import linear_recurrence
from attnlab.mixers.parts.morphology import Morphology
from mixers.definition import assert_defined_by, build, tokens

SMALL = {"inner_dim": 4, "state_dim": 3, "kernel_size": 3}


def _neighbourhood(image: Tensor, weight: Tensor, sign: int, kind: str) -> Tensor:
    """Dilation (sign 1) or erosion (-1) of a plane (H, W) with one element (k, k)."""
    size, rows = weight.shape[0], []
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            found = []
            for i in range(size):
                for j in range(size):
                    a, b = y + i - size // 2, x + j - size // 2
                    if 0 <= a < image.shape[0] and 0 <= b < image.shape[1]:
                        cell = image[a, b]
                        found.append(sign * weight[i, j] * cell if kind == "convolution" else cell + sign * weight[i, j])
            found = torch.stack(found)
            rows.append(found.sum() if kind == "convolution" else (found.max() if sign == 1 else found.min()))
    return torch.stack(rows).view(image.shape)


def _definition(mixer, x: Tensor, h: int, w: int, kind: str, gate: str) -> Tensor:
    out = []
    for example in x.view(x.shape[0], h, w, -1):
        bands = range(example.shape[-1])
        both = []
        for sign, name in ((-1, "erosion"), (1, "dilation")):
            of_band, of_column = getattr(mixer.spatial, name)[:, 0], getattr(mixer.spectral, name)[:, 0]
            spatial = torch.stack([_neighbourhood(example[:, :, k], of_band[k], sign, kind) for k in bands], -1)
            shared = len(of_column) == 1
            columns = [_neighbourhood(example[:, j].mT, of_column[0 if shared else j], sign, kind).mT for j in range(w)]
            both.append((spatial, torch.stack(columns, 1)))
        maps = [mixer.embed(torch.cat((eroded, dilated), -1)) for eroded, dilated in zip(*both, strict=True)]
        row, gated = maps[0][h // 2], []
        for t, layer in zip(maps, (mixer.spatial_gate, mixer.spectral_gate), strict=True):
            chosen = {"transposed": lambda i, j: i, "row": lambda i, j: j, "centre": lambda i, j: w // 2}[gate]
            gated.append(torch.stack([t[i, j] * torch.sigmoid(layer(row[chosen(i, j)])) for i in range(h) for j in range(w)]))
        q, k, v = mixer.q_proj(gated[0]), mixer.k_proj(gated[1]), mixer.v_proj(gated[1])
        heads = []
        for one in zip(*(t.chunk(mixer.num_heads, -1) for t in (q, k, v)), strict=True):
            scores = torch.exp(one[0] @ one[1].mT / one[0].shape[-1] ** 0.5)
            heads.append(scores / scores.sum(-1, keepdim=True) @ one[2])
        state, states = torch.zeros(mixer.out_proj.in_features, dtype=x.dtype), []
        for token in torch.cat(heads, -1):
            state = mixer.transition(state) + mixer.write(token)
            states.append(state)
        out.append(mixer.out_proj(torch.stack(states)))
    return torch.stack(out)


@pytest.mark.tier("T2", "mixer:morpmamba")
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((3, 3), {"columns": 3}),
        ((3, 3), {"morphology": "max_plus"}),
        ((2, 4), {"gate": "row", "columns": 4, "morphology": "max_plus"}),
        ((3, 2), {"gate": "centre"}),
    ],
)
def test_morpmamba(grid, options) -> None:
    mixer = build("morpmamba", 4, 2, **SMALL, **options)
    kind, gate = options.get("morphology", "convolution"), options.get("gate", "transposed")
    n = grid[0] * grid[1]
    assert_defined_by(mixer, lambda x: _definition(mixer, x, *grid, kind, gate), tokens(n, 4), grid=grid)


def test_the_recurrence_token_by_token() -> None:
    transition = (0.4 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    for n in (1, 2, 3, 7, 16, 23):
        u = torch.randn(2, n, 3, dtype=torch.float64)
        state, states = torch.zeros(2, 3, dtype=torch.float64), []
        for token in u.unbind(1):
            state = state @ transition.mT + token
            states.append(state)
        ours, theirs = linear_recurrence(u, transition), torch.stack(states, 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        pair = [torch.autograd.grad(y.sin().sum(), transition)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)


def test_padding_is_passed_over() -> None:
    mixer = build("morpmamba", 4, 2, **SMALL, gate="row")
    x = tokens(6, 4, batch=1).detach()
    mask = torch.tensor([[True, True, True, False, False, False]])
    wide = mixer.last_state(x, mask=mask, grid=(2, 3))
    moved = x.clone()
    moved[:, 3:] = torch.nan
    assert torch.equal(mixer.last_state(moved, mask=mask, grid=(2, 3)), wide)
    assert torch.equal(mixer.last_state(x, mask=mask & False, grid=(2, 3)), torch.zeros_like(wide))


def test_the_last_state_is_what_the_last_token_reads() -> None:
    mixer = build("morpmamba", 4, 2, **SMALL, gate="row")
    x = tokens(6, 4)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    y = mixer(x, mask=mask, grid=(2, 3))
    torch.testing.assert_close(mixer.out_proj(mixer.last_state(x, mask=mask, grid=(2, 3))), torch.stack((y[0, 3], y[1, 5])))
    torch.testing.assert_close(mixer.out_proj(mixer.last_state(x, grid=(2, 3))), mixer(x, grid=(2, 3))[:, -1])


def test_elements_are_flat_or_boxes_at_first() -> None:
    x = torch.randn(1, 2, 5, 5)
    dilated, eroded = Morphology(2, 3, "max_plus")(x)
    torch.testing.assert_close(dilated, torch.nn.functional.max_pool2d(x, 3, 1, 1))
    torch.testing.assert_close(eroded, -torch.nn.functional.max_pool2d(-x, 3, 1, 1))
    dilated, eroded = Morphology(2, 3)(x)
    torch.testing.assert_close(dilated, 9 * torch.nn.functional.avg_pool2d(x, 3, 1, 1))
    torch.testing.assert_close(eroded, -dilated)


@pytest.mark.parametrize("gate", ["row", "centre"])
def test_contract_with_max_plus(gate) -> None:
    options = {**SMALL, "inner_dim": 8, "morphology": "max_plus", "gate": gate}
    report = check("morpmamba", options=options, only=["padding_*", "empty_rows", "precision_*", "batch_*"])
    assert report.passed, report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_dim": 5}, "inner_dim"),
        ({"state_dim": 0}, "state_dim"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"morphology": "median"}, "morphology"),
        ({"gate": "column"}, "gate"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("morpmamba", 8, 4, **options)


def test_patches_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="square"):
        create_mixer("morpmamba", 4, 2, **SMALL)(torch.randn(1, 6, 4), grid=(2, 3))
    with pytest.raises(ValueError, match="3 columns"):
        create_mixer("morpmamba", 4, 2, **SMALL, columns=3)(torch.randn(1, 4, 4), grid=(2, 2))
