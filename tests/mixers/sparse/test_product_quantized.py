"""Product-quantised attention against its definition written out pair by pair, its selection and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer, record
from mixers.definition import assert_defined_by, build, tokens
from mixers.pattern_definition import over_keys


def code(z: Tensor, book: Tensor) -> list[int]:
    """One vector's codes, by loops."""
    parts, words, width = book.shape
    found = []
    for m in range(parts):
        far = [float((z[m * width : (m + 1) * width] - book[m, e]).abs().sum()) for e in range(words)]
        found.append(far.index(min(far)))
    return found


def chosen_keys(mixer, x: Tensor, causal: bool, count: int):
    """The keys of each query of the one example, by the card's slots."""
    book, d = mixer.quantizer.codebook.detach(), mixer.head_dim
    q, k = (p(x)[0].detach() for p in (mixer.q_proj, mixer.k_proj))

    def keys(h: int, i: int, n: int) -> list[int]:
        own = code(q[i, h * d : (h + 1) * d], book)
        slots = {}
        for j in range(i + 1 if causal else n):
            agree = sum(a == b for a, b in zip(own, code(k[j, h * d : (h + 1) * d], book), strict=True))
            slots[j] = min(3, agree // max(1, len(book) // 4))
        return sorted(sorted(slots, key=lambda j: (-slots[j], j))[:count])

    return keys


@pytest.mark.tier("T2", "mixer:product_quantized")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("width", "count"), [(1, 3), (2, 4), (8, 2)])
def test_equals_its_definition(causal, width, count) -> None:
    mixer = build("product_quantized", 16, 2, code_width=width, num_codes=3, num_keys=count, causal=causal)
    x = tokens(11, 16, 1)
    assert_defined_by(mixer, over_keys(mixer, chosen_keys(mixer, x, causal, count)), x)


@pytest.mark.tier("T2", "mixer:product_quantized")
def test_codebook_loss() -> None:
    mixer = build("product_quantized", 8, 2, code_width=2, num_codes=3)
    z = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    book, total = mixer.quantizer.codebook, torch.zeros((), dtype=torch.float64)
    for vector in z.reshape(-1, 4):
        chosen = code(vector.detach(), book.detach())
        for m in range(2):
            part = vector[2 * m : 2 * m + 2]
            weights = torch.stack([-(part - word).abs().sum().clamp(min=1e-5).log() for word in book[m]]).softmax(0)
            soft, hard = weights @ book[m], book[m, chosen[m]]
            total = total + (soft - hard).square().sum() + (part - hard).square().sum()
    ours, theirs = mixer.quantizer.loss(z), total / z.numel()
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y, (z, book)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_as_many_keys_as_tokens_is_dense_attention(causal) -> None:
    mixer, dense = build("product_quantized", code_width=2, num_keys=20, causal=causal), build("softmax", causal=causal)
    dense.load_state_dict({name: value for name, value in mixer.state_dict().items() if "quantizer" not in name})
    x = tokens(13)
    torch.testing.assert_close(mixer(x), dense(x))


@settings(max_examples=15)
@given(st.data())
def test_selection_is_recorded_and_real(data) -> None:
    n, count = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 8))
    causal = data.draw(st.booleans())
    mixer = build("product_quantized", 8, 2, num_keys=count, code_width=4, num_codes=2, causal=causal, num_kv_heads=1)
    x, mask = torch.randn(2, n, 8, dtype=torch.float64), torch.rand(2, n) > 0.3
    with record(mixer, only=["selection", "codebook_loss"]) as tape:
        mixer(x, mask=mask)
        loss = tape["codebook_loss"]
        x = x.masked_fill(~mask.unsqueeze(-1), 7.0)
        mixer(x, mask=mask)
    torch.testing.assert_close(tape["codebook_loss"], loss)
    chosen = tape["selection"]
    assert chosen.shape == (2, 2, n, min(count, n))
    place = chosen.clamp(min=0)
    assert bool((mask[:, None, None].expand(-1, 2, n, -1).gather(-1, place) | (chosen < 0)).all())
    assert not causal or bool((chosen <= torch.arange(n)[:, None]).all())
    allowed = mask[:, None, None, :] & ((torch.ones(n, n).tril() > 0) if causal else torch.ones(n, n) > 0)
    assert torch.equal((chosen >= 0).sum(-1), allowed.sum(-1).clamp(max=count).expand(-1, 2, -1))


def test_agreement_finds_most_of_the_mass() -> None:
    """Codes of near vectors agree: an eighth of the keys holds about half of the attention here, 0.5 when it was written."""
    torch.manual_seed(0)
    n, mixer = 128, create_mixer("product_quantized", 16, 1, num_keys=16, code_width=2, num_codes=8).double()
    with torch.no_grad():
        mixer.k_proj.weight.copy_(mixer.q_proj.weight)
        x = 2 * torch.randn(1, n, 16, dtype=torch.float64)
        with record(mixer, only=["selection"]) as tape:
            mixer(x)
        q, k, _ = mixer.project(x)
        dense = (q @ k.mT / math.sqrt(16)).softmax(-1)
    assert float(dense.gather(-1, tape["selection"]).sum(-1).mean()) > 3 * 16 / n


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_keys: expected at least 1"):
        create_mixer("product_quantized", 16, 2, num_keys=0)
    with pytest.raises(ValueError, match="code_width: expected a divisor of 8"):
        create_mixer("product_quantized", 16, 2, code_width=3)
    with pytest.raises(ValueError, match="num_codes: expected at least 1"):
        create_mixer("product_quantized", 16, 2, num_codes=0)
    with pytest.raises(ValueError, match="position: expected 'none' or 'rotary'"):
        create_mixer("product_quantized", 16, 2, position="alibi")
