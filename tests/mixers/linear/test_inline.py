"""Injective linear attention by its definition, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnlab
from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens

DIM, HEADS = 12, 3
MAPS = {
    "identity": lambda t: t,
    "relu": lambda t: t.clamp(min=0),
    "leaky_relu": lambda t: torch.where(t > 0, t, 0.01 * t),
    "exp": lambda t: torch.exp(0.2 * t),
}


def _attention(mixer, x: Tensor, context: Tensor, real: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens mixed by the weights, and the values, of one example."""
    d, n, phi, heads = DIM // HEADS, len(real), MAPS[mixer.kernel], []
    v = mixer.v_proj(context)
    parts = (split_heads(t, HEADS) for t in (phi(mixer.q_proj(x)), phi(mixer.k_proj(context)), v))
    for q, k, values in zip(*parts, strict=True):
        rows = []
        for i in range(len(x)):
            scores = {j: d**-0.5 / n * (q[i] * k[j]).sum() for j in real}
            rest = (1 - sum(scores.values())) / n
            rows.append(sum((a + rest) * values[j] for j, a in scores.items()))
        heads.append(torch.stack(rows))
    return torch.cat(heads, -1), v


def _residual(mixer, x: Tensor, v: Tensor, grid: tuple[int, int], real: list[int], prefix: int) -> Tensor:
    """The 3 x 3 kernels from the mean token, group by group; the convolution, cell by cell."""
    w1, w2, width = mixer.residual.hidden, mixer.residual.predict, DIM // HEADS
    mean, kernels = sum(x[i] for i in real) / len(real), []
    for g in range(HEADS):
        mine = slice(g * width, (g + 1) * width)
        hidden = w1.weight[mine, :, 0] @ mean[mine] + w1.bias[mine]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        mine9 = slice(9 * g * width, 9 * (g + 1) * width)
        kernels.append((w2.weight[mine9, :, 0] @ hidden + w2.bias[mine9]).view(width, 3, 3))
    kernel, rows = torch.cat(kernels), []
    for here in range(len(x)):
        total = torch.zeros(DIM, dtype=x.dtype)
        for there in real if here >= prefix else ():
            if there < prefix:
                continue
            (y, x1), (y2, x2) = divmod(here - prefix, grid[1]), divmod(there - prefix, grid[1])
            if abs(y2 - y) <= 1 and abs(x2 - x1) <= 1:
                total = total + kernel[:, y2 - y + 1, x2 - x1 + 1] * v[there]
        rows.append(total)
    return torch.stack(rows)


def definition(mixer, x: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    out = []
    for b, example in enumerate(x):
        real = [i for i in range(len(example)) if mask is None or mask[b, i]]
        mixed, v = _attention(mixer, example, example, real)
        if mixer.residual is not None:
            mixed = mixed + _residual(mixer, example, v, grid, real, mixer.num_prefix)
        out.append(mixer.out_proj(mixed))
    y = torch.stack(out)
    return y if mask is None else y * mask[..., None]


@pytest.mark.tier("T2", "mixer:inline")
@pytest.mark.parametrize("kernel", list(MAPS))
def test_kernels(kernel) -> None:
    mixer = build("inline", DIM, HEADS, kernel=kernel)
    assert_defined_by(mixer, lambda x: definition(mixer, x, (3, 4)), tokens(12, DIM), grid=(3, 4))


@pytest.mark.tier("T2", "mixer:inline")
@pytest.mark.parametrize("class_token", [False, True])
def test_masked_tokens_take_no_part(class_token) -> None:
    mixer = build("inline", DIM, HEADS, class_token=class_token)
    n = 12 + class_token
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[0, 5] = mask[0, -1] = mask[1, int(class_token)] = False
    assert_defined_by(
        mixer, lambda x: definition(mixer, x * mask[..., None], (3, 4), mask), tokens(n, DIM), grid=(3, 4), mask=mask
    )


@pytest.mark.tier("T2", "mixer:inline")
def test_a_sequence() -> None:
    """A grid of height 1, or kernels of one row."""
    flat, line = build("inline", DIM, HEADS), build("inline", DIM, HEADS, rank=1)
    assert_defined_by(flat, lambda x: definition(flat, x, (1, 7)), tokens(7, DIM))
    assert line.residual.predict.weight.shape == (3 * DIM, DIM // HEADS, 1)
    with torch.no_grad():
        for name, parameter in line.named_parameters():
            other = dict(flat.named_parameters())[name]
            same = other.shape == parameter.shape
            parameter.copy_(other if same else other.unflatten(0, (DIM, 3, 3))[:, 1].flatten(0, 1))
    x = tokens(7, DIM).detach()
    torch.testing.assert_close(line(x), flat(x))


@pytest.mark.tier("T2", "mixer:inline")
def test_from_another_sequence() -> None:
    mixer, context = build("inline", DIM, HEADS, kernel="exp"), tokens(4, DIM).detach()

    def expected(x: Tensor) -> Tensor:
        mixed = [_attention(mixer, x[b], context[b], list(range(4)))[0] for b in range(2)]
        return mixer.out_proj(torch.stack(mixed))

    assert_defined_by(mixer, expected, tokens(6, DIM), context=context)


@pytest.mark.parametrize("options", [{"class_token": True}, {"residual": False}], ids=str)
def test_the_contract_with_options(options) -> None:
    laws = ["padding*", "empty*", "mixing*", "packed*", "permutation*", "order*", "batch*"]
    report = attnlab.check("inline", options=options, only=laws)
    assert report.passed, str(report)


def test_kernels_are_the_examples_own() -> None:
    mixer, x = build("inline", DIM, HEADS), tokens(12, DIM).detach()
    kernels = mixer.residual.kernels(x, None)
    assert kernels.shape == (2, DIM, 3, 3)
    assert not torch.allclose(kernels[0], kernels[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "elu"}, "kernel: expected one of"),
        ({"rank": 3}, "rank: expected 1 or 2"),
        ({"head_dim": 2}, "head_dim: expected the default 4"),
        ({"position": "rotary"}, "position: expected 'none'"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("inline", DIM, HEADS, **options)
