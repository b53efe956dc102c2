"""LongVQ by its definition, pair by pair; its codebook, and the linear form against the dense one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnlab
from attnlab import create_mixer, record
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 6, 2
OPTIONS = {"codebook_size": 4, "window": 3, "key_dim": 4, "structure_dim": 2, "codebook_std": 0.3}


def _average(layer, u: Tensor, real: Tensor, structure: str) -> Tensor:
    """One example, token by token; masked ones are passed over."""
    out = []
    if structure == "ema":
        enter, damp = torch.sigmoid(layer.alpha), torch.sigmoid(layer.alpha) * torch.sigmoid(layer.delta)
        state = torch.zeros_like(layer.alpha)
    else:
        step = F.softplus(layer.dt_bias)[:, None]
        rates = torch.exp(step * torch.complex(-layer.A_log.exp(), layer.A_imag))
        state = torch.zeros_like(rates)
    for t, token in enumerate(u):
        if real[t] and structure == "ema":
            state = enter * layer.beta * token[:, None] + (1 - damp) * state
        elif real[t]:
            state = rates * state + step * torch.view_as_complex(layer.B) * token[:, None]
        if structure == "ema":
            y = (layer.eta * state).sum(-1) / layer.eta.shape[1] ** 0.5
            skip = layer.omega
        else:
            y, skip = 2 * (torch.view_as_complex(layer.C) * state).sum(-1).real, layer.D
        out.append(y if skip is None else y + skip * token)
    return torch.stack(out)


def _definition(mixer, x: Tensor, structure: str = "ema", real: Tensor | None = None) -> Tensor:
    real = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
    words, window, out = mixer.codebook.vectors, mixer.window, []
    for example, there in zip(x * real[..., None], real, strict=True):
        u = F.layer_norm(example, (DIM,), mixer.norm.weight, mixer.norm.bias) * there[:, None]
        a = _average(mixer.structure.past, u, there, structure)
        if not mixer.causal:
            a = a + _average(mixer.structure.future, u.flip(0), there.flip(0), structure).flip(0)
        a = a * torch.sigmoid(a)
        z = F.silu(mixer.key_proj(a))
        q, k = (mixer.kappa[s] * z + mixer.mu[s] for s in range(2))
        v = F.silu(u @ mixer.value_proj.weight.T)
        rows = []
        for i in range(len(example)):
            heads = []
            for h in range(HEADS):
                keys, values = k.chunk(HEADS, -1)[h], v.chunk(HEADS, -1)[h]
                scores, seen = [], [j for j in range(i + 1 if mixer.causal else len(example)) if there[j]]
                for j in seen:
                    nearest = min(range(4), key=lambda c: float((keys[j] - words[h, c]).detach().norm()))
                    near = abs(i - j) < window
                    key = keys[j] + (words[h, nearest] - keys[j]).detach() if near else words[h, nearest]
                    score = q.chunk(HEADS, -1)[h][i] @ key / keys.shape[1] ** 0.5
                    place = i - j if mixer.causal else i - j + window - 1
                    scores.append(score + mixer.bias[h, place] if near else score)
                weights = [torch.exp(s) for s in scores]
                mixed = sum((w * values[j] for w, j in zip(weights, seen, strict=True)), torch.zeros_like(values[0]))
                heads.append(mixed / sum(weights) if seen else mixed)
            r, h, f = mixer.gates(a[i]).split([mixer.inner, DIM, DIM])
            h = F.silu(h + mixer.out_proj.weight @ (F.silu(r) * torch.cat(heads)))
            f = torch.sigmoid(f)
            rows.append((f * h + (1 - f) * example[i] if mixer.highway else f * h) * there[i])
        out.append(torch.stack(rows))
    return torch.stack(out)


def _build(**options):
    torch.manual_seed(5)
    return build("longvq", DIM, HEADS, **{**OPTIONS, **options}).eval()


@pytest.mark.tier("T2", "mixer:longvq")
@pytest.mark.parametrize("structure", ["ema", "s4d"])
@pytest.mark.parametrize("causal", [False, True])
def test_longvq(causal, structure) -> None:
    mixer = _build(causal=causal, structure=structure)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, structure), tokens(11, DIM))


@pytest.mark.parametrize("causal", [False, True])
def test_masked_tokens_and_no_highway(causal) -> None:
    mixer = _build(causal=causal, highway=False)
    real = torch.rand(2, 11, generator=torch.Generator().manual_seed(2)) > 0.4
    real[0, :4], real[1, 5:] = False, False
    assert_defined_by(mixer, lambda x: _definition(mixer, x, real=real), tokens(11, DIM), mask=real)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 5, 64])
def test_blocks_and_codewords_give_what_all_pairs_give(causal, window) -> None:
    mixer = _build(causal=causal, window=window)
    x = tokens(150, DIM).detach()
    with record(mixer) as tape, torch.no_grad():
        mixer(x)
        q = mixer._project(x, None, None)[1]
        codes = tape["codes"]
        scores = q @ mixer.codebook.look_up(codes).mT / 2**0.5
        offset = torch.arange(150)[:, None] - torch.arange(150)
        place = offset if causal else offset + window - 1
        scores = scores + torch.where(offset.abs() < window, mixer.bias[:, place.clamp(0, mixer.bias.shape[1] - 1)], 0.0)
        expected = scores.masked_fill((offset < 0) & causal, float("-inf")).softmax(-1) @ tape["values"]
    torch.testing.assert_close(tape["mixed"], expected)
    torch.testing.assert_close(mixer.mixing_matrix(x) @ tape["values"], expected)


def test_a_codeword_that_no_key_has_does_not_take_the_others_out_of_range() -> None:
    mixer = create_mixer("longvq", 4, codebook_size=2, window=1, key_dim=2, structure_dim=1, causal=True)
    with torch.no_grad():
        mixer.mu.copy_(torch.tensor([[300.0, 0.0], [-1.0, 0.0]]))
        mixer.codebook.sums.copy_(torch.tensor([[[-1.0, 0.0], [9.0, 0.0]]]))
    y = mixer.eval()(torch.randn(1, 6, 4))
    y.sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(p.grad).all() for p in mixer.parameters() if p.grad is not None)
    with record(mixer) as tape:
        mixer(torch.randn(1, 6, 4))
    assert float(tape["mixed"].detach().abs().amin(-1).max()) > 0.0


def test_the_codebook_follows_the_real_keys_of_a_batch_in_training() -> None:
    mixer = _build(decay=0.9).train()
    x, real = tokens(7, DIM), torch.tensor([[True] * 4 + [False] * 3, [False] + [True] * 6])
    before, counts, sums = (t.clone() for t in (mixer.codebook.vectors, mixer.codebook.counts, mixer.codebook.sums))
    with record(mixer) as tape:
        y = mixer(x, mask=real)
    k = mixer._project(x * real[..., None], None, real)[2].detach()
    loss = torch.zeros((), dtype=torch.float64)
    for h in range(HEADS):
        for c in range(4):
            mine = [k[b, h, j] for b in range(2) for j in range(7) if real[b, j] and tape["codes"][b, h, j] == c]
            loss = loss + sum(((key - before[h, c]) ** 2).sum() for key in mine)
            counts[h, c] = 0.9 * counts[h, c] + 0.1 * len(mine)
            sums[h, c] = 0.9 * sums[h, c] + 0.1 * sum(mine, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(mixer.codebook.counts, counts)
    torch.testing.assert_close(mixer.codebook.sums, sums)
    torch.testing.assert_close(tape["commitment_loss"].detach(), 1e-4 * loss / (HEADS * 10))
    total = counts.sum(-1, keepdim=True)
    torch.testing.assert_close(
        mixer.codebook.vectors, sums / ((counts + 1e-5) * total / (total + 4e-5))[..., None], rtol=1e-12, atol=0.0
    )
    (y.sum() + tape["commitment_loss"]).backward()  # the update has not touched what the backward pass reads
    mixer.eval()(x)
    torch.testing.assert_close(mixer.codebook.counts, counts)


def test_the_codebook_learns_when_it_is_told_to() -> None:
    told, by_itself = _build(update="manual").train(), _build().train()
    x, mask = tokens(7, DIM).detach(), torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    first = told(x, mask=mask)
    assert torch.equal(first, told(x, mask=mask))
    told.update_codebook(x, mask=mask)
    by_itself(x, mask=mask)
    torch.testing.assert_close(told.codebook.vectors, by_itself.codebook.vectors)
    assert not torch.equal(first, told(x, mask=mask))


def test_the_codebook_is_seeded_with_distinct_real_keys() -> None:
    mixer, x = _build(), tokens(9, DIM).detach()
    real = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    mixer.seed_codebook(x, mask=real, generator=torch.Generator().manual_seed(4))
    first = mixer.codebook.vectors.clone()
    k = mixer._project(x * real[..., None], None, real)[2].detach()
    for h in range(HEADS):
        gaps = (first[h][:, None] - k[:, h][real]).norm(dim=-1)
        assert float(gaps.amin(1).max()) < 1e-12 and len(set(gaps.argmin(1).tolist())) == 4
    mixer.seed_codebook(x, mask=real, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, mixer.codebook.vectors)
    mixer.seed_codebook(x[:1, :1])  # fewer keys than codewords
    assert torch.isfinite(mixer.codebook.vectors).all()


@pytest.mark.parametrize("structure", ["ema", "s4d"])
def test_streaming_beyond_the_window(structure) -> None:
    mixer = _build(causal=True, structure=structure)
    x = tokens(40, DIM).detach()
    state, pieces = mixer.init_state(2), []
    for piece in x.split([1, 2, 7, 13, 1, 16], dim=1):
        y, state = mixer.extend(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))
    assert float(state["sums"][..., -1].detach().sum()) == 2 * HEADS * (40 - 3)


@pytest.mark.parametrize("options", [{"highway": True}, {"structure": "s4d"}])
def test_the_contract_in_other_forms(options) -> None:
    # not its jumps: with the path around the attention the output is mostly the input, and they are too small to be found
    report = attnlab.check("longvq", options=options, only=["padding*", "caus*", "streaming*", "precision*", "batch*"])
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("option", "value"),
    [("window", 0), ("expand", 0), ("key_dim", 5), ("codebook_size", 0), ("decay", 1.0), ("structure", "lstm"),
     ("structure_dim", 0), ("commitment", -1.0), ("update", "never")],
)  # fmt: skip
def test_bad_options(option, value) -> None:
    with pytest.raises(ValueError, match=option):
        create_mixer("longvq", DIM, HEADS, **{**OPTIONS, option: value})
