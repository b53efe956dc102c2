"""Sparsifiner against its equations written out pair by pair, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer, record
from attnlab.core.errors import UnsupportedError
from mixers.definition import assert_defined_by, build, split_heads, tokens


def definition(mixer, rate, threshold, coef, basis, mask=None):
    predictor = mixer.predictor

    def attend(x: Tensor) -> Tensor:
        n, heads = x.shape[1], mixer.num_heads
        q, k, v = (split_heads(p(x), heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        down, up = predictor.down.detach(), predictor.up.detach().abs()
        out = []
        for b in range(len(x)):
            real = [i for i in range(n) if mask is None or mask[b, i]]
            columns = []
            for h in range(heads):
                small_k = sum(torch.outer(predictor.k_proj(k[h][b, j]).detach(), down[j]) for j in real)
                rows = []
                for i in range(n):
                    if i not in real:
                        rows.append(torch.zeros_like(v[h][b, i]))
                        continue
                    c = (predictor.q_proj(q[h][b, i]).detach() @ small_k / math.sqrt(heads)).softmax(0)
                    score = {
                        j: sum(float(c[r] * up[j, r]) for r in range(len(c)) if c[r] > coef and up[j, r] > basis) for j in real
                    }
                    keys = sorted(real, key=lambda j: -score[j])[: math.ceil(rate * n)]
                    if threshold is not None:
                        keys = [j for j in real if score[j] > threshold]
                    if i == 0 and mixer.num_prefix:
                        keys = real
                    if not keys:
                        rows.append(torch.zeros_like(v[h][b, i]))
                        continue
                    logits = k[h][b, keys] @ q[h][b, i] / math.sqrt(q[h].shape[-1])
                    rows.append(logits.softmax(0) @ v[h][b, keys])
                columns.append(torch.stack(rows))
            out.append(torch.cat(columns, dim=-1))
        y = mixer.out_proj(torch.stack(out))
        return y if mask is None else y * mask.unsqueeze(-1)

    return attend


@pytest.mark.tier("T2", "mixer:sparsifiner")
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("rate", "threshold", "coef", "basis"), [(0.3, None, 0.01, 0.0), (0.3, 0.2, 0.1, 0.05)])
def test_equals_its_definition(rate, threshold, coef, basis, class_token) -> None:
    options = {"keep_rate": rate, "score_threshold": threshold, "coef_threshold": coef, "basis_threshold": basis}
    mixer = build("sparsifiner", 12, 3, num_tokens=11, reduce_tokens=2, class_token=class_token, **options)
    assert_defined_by(mixer, definition(mixer, rate, threshold, coef, basis), tokens(11, 12))


@pytest.mark.tier("T2", "mixer:sparsifiner")
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 11), st.integers(1, 4), st.floats(0.1, 1.0), st.booleans(), st.integers(0, 99))
def test_any_sizes_and_masks(n, reduced, rate, class_token, seed) -> None:
    mixer = build("sparsifiner", 4, 2, num_tokens=n, reduce_tokens=reduced, keep_rate=rate, class_token=class_token)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, n, generator=generator) < 0.7
    x = torch.randn(2, n, 4, generator=generator, dtype=torch.float64)
    if n > class_token:
        expected = definition(mixer, rate, None, 0.01, 0.0, mask)(x)
        torch.testing.assert_close(mixer(x, mask=mask), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"keep_rate": 1}, {"score_threshold": -1}, {"dense_training": True}])
def test_all_keys_are_dense_attention(options) -> None:
    mixer, dense = build("sparsifiner", num_tokens=9, **options), build("softmax")
    dense.load_state_dict({name: value for name, value in mixer.state_dict().items() if "predictor" not in name})
    x = tokens(9)
    torch.testing.assert_close(mixer(x), dense(x))


def test_the_predictor_learns_the_map() -> None:
    torch.manual_seed(0)
    mixer = create_mixer("sparsifiner", 16, 2, num_tokens=24, reduce_tokens=2, class_token=False)
    with torch.no_grad():
        mixer.q_proj.weight.mul_(4.0)
        mixer.k_proj.weight.mul_(4.0)
    x = torch.randn(4, 24, 16) + 2 * torch.randn(24, 16)

    def kept() -> float:
        """The share of the dense map's weight that is kept."""
        with record(mixer, only=["selection"]) as tape, torch.no_grad():
            mixer(x)
            dense = create_mixer("softmax", 16, 2)
            dense.load_state_dict({k: v for k, v in mixer.state_dict().items() if "predictor" not in k})
            return float((dense.mixing_matrix(x) * tape["selection"]).sum(-1).mean())

    before = kept()
    optimizer = torch.optim.Adam(mixer.predictor.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        mixer.reconstruction_loss(x).backward()
        optimizer.step()
    assert mixer.q_proj.weight.grad is None
    assert kept() > before + 0.1


def test_the_loss_ignores_padding() -> None:
    mixer = build("sparsifiner", num_tokens=9)
    x, mask = tokens(9).detach(), torch.arange(9).expand(2, -1) < 6
    other = torch.where(mask.unsqueeze(-1), x, 7.0)
    torch.testing.assert_close(mixer.reconstruction_loss(x, mask=mask), mixer.reconstruction_loss(other, mask=mask))


def test_options_and_refusals() -> None:
    shared = create_mixer("sparsifiner", 8, 2, num_tokens=9, shared_basis=True)
    assert shared.predictor.up is shared.predictor.down
    few = build("sparsifiner", num_tokens=9, reduce_tokens=2, coef_top_k=1)
    q, k, _ = few.project(tokens(9))
    assert int((few.predictor.pruned(few.predictor.coefficients(q, k, None)) > 0).sum(-1).max()) == 1
    with pytest.raises(ValueError, match="keep_rate: expected a number above 0"):
        create_mixer("sparsifiner", 8, 2, num_tokens=9, keep_rate=0)
    with pytest.raises(ValueError, match="reduce_dim: expected at least 1"):
        create_mixer("sparsifiner", 8, 2, num_tokens=9, reduce_dim=0)
    with pytest.raises(ValueError, match="position: expected 'none'"):
        create_mixer("sparsifiner", 8, 2, num_tokens=9, position="alibi")
    with pytest.raises(UnsupportedError, match="causal=True"):
        create_mixer("sparsifiner", 8, 2, num_tokens=9, causal=True)
