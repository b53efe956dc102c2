"""Kolmogorov-Arnold attention by its definition, edge by edge, and its functions against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnlab
from attnlab import create_mixer
from attnlab.mixers.parts.row_operator import KolmogorovArnoldRows
from attnlab.mixers.parts.univariate import project_to_simplex
from mixers.definition import assert_defined_by, build, tokens

N, DIM, HEADS = 4, 6, 2

PSI = {
    "mexican_hat": lambda t, _: 2 / (math.sqrt(3) * math.pi**0.25) * (t * t - 1) * torch.exp(-t * t / 2),
    "morlet": lambda t, _: torch.cos(5 * t) * torch.exp(-t * t / 2),
    "derivative_of_gaussian": lambda t, _: t * torch.exp(-t * t / 2),
    "meyer": lambda t, _: torch.sin(math.pi * t.abs()) * _meyer(t.abs()),
    "shannon": lambda t, q: torch.sin(t) / t * (0.54 - 0.46 * math.cos(2 * math.pi * q / (N - 1))),
}


def _meyer(t: Tensor) -> Tensor:
    if t < 0.5:
        return torch.ones_like(t)
    if t >= 1:
        return torch.zeros_like(t)
    u = 2 * t - 1
    return torch.cos(math.pi / 2 * u**4 * (35 - 84 * u + 70 * u**2 - 20 * u**3))


def _edge(op: KolmogorovArnoldRows, h: int, p: int, q: int, a: Tensor) -> Tensor:
    """One function of one variable."""
    if op.basis == "fourier":
        terms = zip(op.cosine[:, h, p, q], op.sine[:, h, p, q], strict=True)
        value = sum(c * torch.cos(m * a) + s * torch.sin(m * a) for m, (c, s) in enumerate(terms, start=1))
    elif op.basis == "rational":
        above = sum(c * a**i for i, c in enumerate(op.numerator[:, h, p, q]))
        value = above / (1 + sum(c * a ** (i + 1) for i, c in enumerate(op.denominator[:, h, p, q])).abs())
    else:
        value = op.weight[h, p, q] * PSI[op.basis]((a - op.shift[h, p, q]) / op.scale[h, p, q], q)
    if op.function_weight is not None:
        value = value * op.function_weight[h, p, q]
    base = {"zero": None, "identity": lambda t: t, "silu": F.silu, "gelu": F.gelu}[op.residual]
    if base is not None:
        value = value + base(a) * (1 if op.residual_weight is None else op.residual_weight[h, p, q])
    return value


def _simplex(y: Tensor) -> Tensor:
    """The projection by trying every size of the support."""
    for size in range(len(y), 0, -1):
        best = y.sort(descending=True).values[:size]
        level = (best.sum() - 1) / size
        if best[-1] > level:
            return (y - level).clamp(min=0)
    raise AssertionError


def _definition(mixer, x: Tensor, real: Tensor | None = None) -> Tensor:
    d, op, out = DIM // HEADS, mixer.operator, []
    for b, example in enumerate(x):
        keys = [j for j in range(N) if real is None or real[b, j]]
        q, k, v = (layer(example) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        tokens_out = []
        for i in range(N):
            heads = []
            for h in range(HEADS):
                s = slice(h * d, (h + 1) * d)
                row = {j: (q[i, s] * k[j, s]).sum() / math.sqrt(d) for j in keys}
                size = N if op.up is None else op.up.shape[-1]
                u = torch.stack([sum(_edge(op, h, p, j, row[j]) for j in keys) for p in range(size)])
                sigma = u if op.up is None else op.up[h] @ u
                sigma = sigma[keys]
                sigma = _simplex(sigma) if mixer.simplex else sigma
                heads.append(sum(w * v[j, s] for w, j in zip(sigma, keys, strict=True)))
            tokens_out.append(torch.cat(heads))
        out.append(mixer.out_proj(torch.stack(tokens_out)))
    y = torch.stack(out)
    return y if real is None else y * real[..., None]


@pytest.mark.tier("T2", "mixer:kolmogorov_arnold")
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"rank": None, "num_frequencies": 1},
        {"rank": 2, "residual": "silu", "edge_weights": True},
        {"rank": 2, "residual": "gelu"},
        {"rank": 2, "simplex": True},
        *({"rank": 2, "basis": basis} for basis in ("rational", *PSI)),
        {"rank": None, "basis": "morlet", "edge_weights": True, "residual": "identity"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_kolmogorov_arnold(options) -> None:
    mixer = build("kolmogorov_arnold", DIM, HEADS, num_tokens=N, **options)
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(N, DIM))


@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": 2, "basis": "shannon", "simplex": True}])
def test_masked_tokens_are_in_no_sum(options) -> None:
    mixer = build("kolmogorov_arnold", DIM, HEADS, num_tokens=N, **options)
    real = torch.tensor([[True, False, True, True], [False, True, True, False]])
    assert_defined_by(mixer, lambda x: _definition(mixer, x * real[..., None], real), tokens(N, DIM), mask=real)


@pytest.mark.parametrize("options", [{"basis": "rational", "simplex": True}, {"basis": "meyer", "residual": "gelu"}])
def test_the_contract_of_other_options(options) -> None:
    report = attnlab.check("kolmogorov_arnold", options={"num_tokens": 12, "rank": 2, **options})
    assert report.passed, str(report)


def test_one_operator_for_all_layers() -> None:
    first, second = (create_mixer("kolmogorov_arnold", 8, 2, num_tokens=5) for _ in range(2))
    third = create_mixer("kolmogorov_arnold", 8, 2, num_tokens=5, operator=first.operator)
    second.share_with(first)
    model = torch.nn.ModuleList([first, second, third])
    own = sum(p.numel() for p in first.operator.parameters())
    assert sum(p.numel() for p in model.parameters()) == 3 * (4 * 8 * 8 + 8) + own
    x = torch.randn(1, 5, 8)
    second(third(x)).sum().backward()
    assert first.operator.sine.grad.abs().max() > 0
    with pytest.raises(ValueError, match="operator: expected 2 heads and 6 tokens, got 2 and 5"):
        create_mixer("kolmogorov_arnold", 8, 2, num_tokens=6).share_with(first)


def test_parameters_as_published() -> None:
    """ViT-Tiny with G3B: 36 operators of 2 G r N + r N parameters; the published difference needs 2 r N more."""
    rows = [KolmogorovArnoldRows(3, 197, edge_weights=weights) for weights in (False, True)]
    plain, more = (12 * sum(p.numel() for p in one.parameters()) for one in rows)
    assert plain == 36 * (2 * 3 * 12 * 197 + 12 * 197)
    assert round(more / 1e6, 2) == 0.77 and more - plain == 36 * 2 * 12 * 197


def test_projection_is_the_nearest_distribution() -> None:
    rows = 3 * torch.randn(50, 6, dtype=torch.float64)
    allowed = torch.rand(50, 6) > 0.3
    allowed[0] = False
    got = project_to_simplex(rows, allowed)
    assert (got[0] == 0).all()
    for y, point, some in list(zip(rows, got, allowed, strict=True))[1:]:
        torch.testing.assert_close(point[some], _simplex(y[some]))
        assert (point[~some] == 0).all()
    assert torch.equal(project_to_simplex(torch.tensor([[0.2, 0.8]])), torch.tensor([[0.2, 0.8]]))


def test_bad_options() -> None:
    for options, message in (
        ({"basis": "fuorier"}, "basis: expected one of"),
        ({"residual": "relu"}, "residual: expected one of"),
        ({"rank": 0}, "rank: expected a positive integer, got 0"),
        ({"num_frequencies": 0}, "num_frequencies: expected a positive integer, got 0"),
        ({"num_kv_heads": 1}, "num_kv_heads: expected 2"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer("kolmogorov_arnold", 8, 2, num_tokens=5, **options)
    with pytest.raises(ValueError, match="rows: expected 3 heads and rows of 5"):
        KolmogorovArnoldRows(3, 5)(torch.zeros(1, 2, 4, 5))
