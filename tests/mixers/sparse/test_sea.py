"""SEA by its definition: the estimate on the real tokens alone, the choice column by column, attention key by key."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnlab
from attnlab import create_mixer, record
from attnlab.mixers.sparse.sea_selection import Budget, column_of, first_keys, kept_keys, kept_pairs
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS, D, K, KEPT = 8, 2, 4, 8, 2


def _dense_estimate(est, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and e of one example (h, n, d) without padding."""
    n = q.shape[1]
    eye = F.interpolate(torch.eye(D, dtype=q.dtype)[None, None], size=(n, D), mode="bilinear", align_corners=True)[0, 0]
    w, out = est.directions, []
    for h in range(HEADS):
        logits = [x[h] @ w.T * D**-0.25 for x in (q, k)]
        top = [logits[0].detach().amax(1, keepdim=True), logits[1].detach().max()]
        norms = [(x[h] ** 2).sum(1, keepdim=True) * D**-0.5 / 2 for x in (q, k)]
        fq, fk = (torch.exp(a - c - b) + 1e-4 for a, b, c in zip(logits, top, norms, strict=True))
        rows = []
        for i in range(n):
            weights = torch.stack([fq[i] @ fk[j] for j in range(n)])
            rows.append(sum(weights[j] * torch.cat((eye[j], v[h, j])) for j in range(n)) / weights.sum())
        out.append(torch.stack(rows))
    e = F.gelu(est.norm(est.encode(torch.cat((torch.stack(out), v), -1))))
    maps = torch.cat([est.rows(e)[h].view(n, 4, K // 2).transpose(0, 1) for h in range(HEADS)])[None]
    maps = F.relu(F.conv2d(maps, est.first.weight, est.first.bias, stride=(2, 1), padding=1))
    maps = F.relu(F.conv2d(maps, est.second.weight, est.second.bias, padding=1))
    maps = F.interpolate(maps, scale_factor=(2, 1), mode="nearest")
    scores = F.conv2d(maps, est.last.weight, est.last.bias, padding=1)
    return F.interpolate(scores, size=(n, K), mode="bilinear", align_corners=False)[0], e


def _causal_estimate(est, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    n, w, out = q.shape[1], est.directions, []
    for h in range(HEADS):
        fq, fk = (torch.relu(x[h] @ w.T * D**-0.25) + 1e-3 for x in (q, k))
        rows = []
        for i in range(n):
            seen = [j for j in range(i + 1) if real[j]]
            weights = [fq[i] @ fk[j] for j in seen]
            mixed = sum((a * torch.cat((est.table[int(real[:j].sum())], v[h, j])) for a, j in zip(weights, seen, strict=True)),
                        torch.zeros(2 * D, dtype=q.dtype))  # fmt: skip
            rows.append(mixed / (sum(weights) if seen else 1))
        out.append(torch.stack(rows))
    e = F.gelu(est.norm(est.encode(torch.cat((torch.stack(out), v), -1))))
    maps = est.norm_in(torch.cat([est.rows(e)[h].view(n, 2, K // 4).transpose(0, 1) for h in range(HEADS)]))
    for layer in (est.first, est.second):
        maps = F.pad(maps * real[:, None], (2, 2, 4, 0))[None]
        maps = torch.relu(F.conv2d(maps, layer.weight, layer.bias, dilation=2))[0]
    maps = F.interpolate(maps[None], scale_factor=(1, 4), mode="nearest")
    return est.norm_out(F.conv2d(maps, est.last.weight, est.last.bias)[0]), e


def _chosen(p: Tensor, i: int, length: int, scope: str, wanted: int) -> set[tuple[int, int]]:
    """Head and column of what query i keeps, by sorting all that compete."""
    n, share = p.shape[1], wanted * K / length
    rows = {"query": [(h, i) for h in range(HEADS)], "causal_batch": [(h, i) for h in range(HEADS)]}
    rows["head"] = rows["batch"] = [(h, t) for h in range(HEADS) for t in range(n)]
    groups = (
        [rows[scope]] if scope in ("causal_batch", "batch") else [[r for r in rows[scope] if r[0] == h] for h in range(HEADS)]
    )
    kept = set()
    for group in groups:
        entries = sorted(((float(p[h, t, c].detach()), h, t, c) for h, t in group for c in range(K)), reverse=True)
        kept |= {(h, c) for _, h, t, c in entries[: max(1, round(share * len(group)))] if t == i}
    return kept


def _heads(mixer, example: Tensor, real: Tensor) -> Tensor:
    """Head outputs of the tokens given: all real where not causal."""
    n, causal = len(example), mixer.causal
    q, k, v = (layer(example).view(n, HEADS, D).transpose(0, 1) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    k, v = k * real[:, None], v * real[:, None]
    scores, e = _causal_estimate(mixer.estimator, q, k, v, real) if causal else _dense_estimate(mixer.estimator, q, k, v)
    p, gates = scores.softmax(-1), torch.sigmoid(mixer.estimator.scaler(e))
    out = []
    for i in range(n):
        seen = [j for j in range(i + 1 if causal else n) if real[j]]
        length, heads = max(len(seen), 1), []
        kept = _chosen(p, i, length, mixer.budget.scope, mixer.budget.kept)
        column = {j: math.floor((rank + 0.5) * K / length - 1e-4) for rank, j in enumerate(seen)}
        for h in range(HEADS):
            mine = [j for j in seen if (h, column[j]) in kept]
            weights = [torch.exp(q[h, i] @ k[h, j] / D**0.5) for j in mine]
            zero = torch.zeros(D, dtype=example.dtype)
            found = sum((w * v[h, j] for w, j in zip(weights, mine, strict=True)), zero) / (sum(weights) if mine else 1)
            if causal:
                mean = sum((v[h, j] for j in seen), zero) / length
            else:
                mean = sum(p[h, :, column[j]].mean() * v[h, j] for j in seen)
            size, share = gates[h, i]
            heads.append(share * size * found + (1 - share) * mean)
        out.append(torch.cat(heads))
    return torch.stack(out)


def _definition(mixer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    out = []
    for example, real in zip(x * mask[..., None], mask, strict=True):
        if mixer.causal:
            heads = _heads(mixer, example, real)
        else:  # padding is as if it was not there
            heads = torch.zeros(len(example), DIM, dtype=x.dtype).index_copy(
                0, real.nonzero()[:, 0], _heads(mixer, example[real], real[real])
            )
        out.append(mixer.out_proj(heads) * real[:, None])
    return torch.stack(out)


def _build(**options):
    options = {"num_kept": KEPT, "estimate_dim": K, "generator": torch.Generator().manual_seed(1), **options}
    return build("sea", DIM, HEADS, **options)


@pytest.mark.tier("T2", "mixer:sea")
@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.parametrize(
    ("causal", "scope"),
    [(False, "query"), (False, "causal_batch"), (False, "head"), (False, "batch"), (True, "query"), (True, "causal_batch")],
)
def test_sea(causal, scope, block, monkeypatch) -> None:
    monkeypatch.setattr("attnlab.mixers.sparse.sea_attention.BLOCK", block)
    mixer = _build(causal=causal, scope=scope)
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(11, DIM))


@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_tokens(causal, block, monkeypatch) -> None:
    monkeypatch.setattr("attnlab.mixers.sparse.sea_attention.BLOCK", block)
    mixer = _build(causal=causal, num_kept=1)
    mask = torch.tensor([[False, True, True, False, True, True, True, False, True, True], [True] * 6 + [False] * 4])
    assert_defined_by(mixer, lambda x: _definition(mixer, x, mask), tokens(10, DIM), mask=mask)


def test_few_keys_are_gathered() -> None:
    for kept, columns, scope, heads in [(2, 8, "causal_batch", 2), (1, 4, "causal_batch", 3), (3, 16, "query", 2)]:
        budget = Budget(kept, columns, scope)
        for most in (1, 5, 40, 100):
            lengths = torch.arange(1, most + 1)
            keys = torch.minimum(lengths, budget.of(lengths, heads).clamp(max=columns) * -(-lengths // columns)).max()
            assert int(keys) <= budget.most_keys(most, heads) <= most
        assert budget.most_keys(100, heads) < 100
    mixer, x = _build(causal=True), tokens(40, DIM)
    with record(mixer) as tape:
        mixer(x)
    pairs = kept_pairs(tape["chosen"], torch.arange(1, 41)[None], 40)
    assert int(pairs.sum(-1).max()) <= mixer.budget.most_keys(40, HEADS)
    assert bool((pairs.sum((1, 3)) > 0).all())


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 24, 100])
def test_columns_of_keys_and_keys_of_columns(length) -> None:
    rank = torch.arange(length)
    column = column_of(rank, torch.tensor(length), 8)
    assert column.tolist() == [math.floor((j + 0.5) * 8 / length - 1e-4) for j in range(length)]
    first = first_keys(torch.tensor(length), 8)
    assert first.tolist() == [int((column < c).sum()) for c in range(9)]
    chosen = torch.rand(1, 1, 5, 8) > 0.5
    found, taken = kept_keys(chosen, torch.tensor([[length]]), length)
    for i in range(5):
        assert found[0, 0, i][taken[0, 0, i]].tolist() == [j for j in range(length) if chosen[0, 0, i, column[j]]]


def test_the_choice_has_no_gradient_and_k_may_change_afterwards() -> None:
    mixer, x = _build(), tokens(40, DIM).detach()
    with record(mixer) as tape:
        mixer(x)
    mixer.budget = Budget(4, K, "causal_batch")
    with record(mixer) as more:
        mixer(x)
    assert tape["chosen"].dtype == torch.bool
    assert int(more["chosen"].sum()) == 2 * int(tape["chosen"].sum())
    assert bool((more["chosen"] | ~tape["chosen"]).all())


@pytest.mark.parametrize("causal", [False, True])
def test_distillation(causal) -> None:
    mixer, x = _build(causal=causal), tokens(9, DIM)
    teacher = torch.randn(2, HEADS, 9, 9, dtype=torch.float64)
    context = torch.randn(2, 9, DIM, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    loss = mixer.distillation_loss(x, teacher, context, mask=mask)
    with record(mixer) as tape:
        mixer(x, mask=mask)
    q, k, _ = mixer.project(x)
    scores, divergence, gaps = mixer._heads(x * mask[..., None], mask)[1].estimate.scores, 0.0, 0.0
    for b, n in enumerate((9, 6)):
        for h in range(HEADS):
            for i in range(n):
                seen = range(i + 1 if causal else n)
                length = i + 1 if causal else n
                target = torch.softmax(teacher[b, h, i, list(seen)], -1)
                resized = torch.stack([scores[b, h, i, math.floor((j + 0.5) * K / length - 1e-4)] for j in seen])
                for logits in (resized, q[b, h, i] @ k[b, h, list(seen)].T / D**0.5):
                    ours = torch.softmax(logits, -1)
                    divergence = divergence + (target * (target / ours).log()).sum()
                    gaps = gaps + (target - ours).square().sum()
    mixed = tape["mixed"].transpose(1, 2).flatten(2)
    expected = 0.1 * divergence / (15 * (HEADS if causal else 1)) + gaps / (HEADS * (81 + 36))
    expected = expected + (mixed - context)[mask].square().mean()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(t, mixer.estimator.parameters(), allow_unused=True, retain_graph=True)
                              for t in (loss, expected)), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


def test_distillation_finds_the_teachers_best_keys() -> None:
    torch.manual_seed(0)
    mixer = create_mixer("sea", 16, 2, num_kept=4, estimate_dim=16, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 24, 16)
    scores = 3.0 * torch.randn(1, 2, 24, 24).expand(4, -1, -1, -1)
    context = torch.zeros(4, 24, 16)

    def recall() -> float:
        with record(mixer) as tape:
            mixer(x)
        pairs = kept_pairs(tape["chosen"], torch.tensor([[24]]), 24)
        best = scores.topk(4, dim=-1).indices
        return float(pairs.gather(-1, best).double().mean())

    before, optimizer = recall(), torch.optim.Adam(mixer.estimator.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        mixer.distillation_loss(x, scores, context).backward()
        optimizer.step()
    assert recall() > before + 0.2


@pytest.mark.parametrize("causal", [False, True])
def test_the_contract_where_keys_are_gathered(causal, monkeypatch) -> None:
    monkeypatch.setattr("attnlab.mixers.sparse.sea_attention.BLOCK", 3)
    options = {"num_kept": 1, "estimate_dim": 4, "causal": causal}
    report = attnlab.check("sea", options=options, only=["padding*", "caus*", "streaming*", "batch*", "mixing*", "empty*"])
    assert report.passed, str(report)


def test_directions_come_from_the_generator() -> None:
    one, two = (_build(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.estimator.directions, two.estimator.directions)
    one.redraw(torch.Generator().manual_seed(4))
    assert not torch.equal(one.estimator.directions, two.estimator.directions)


def test_more_tokens_than_the_table_has() -> None:
    mixer = _build(causal=True, max_len=5)
    state = mixer.extend(tokens(4, DIM), mixer.init_state(2))[1]
    with pytest.raises(ValueError, match="max_len=5"):
        mixer.extend(tokens(2, DIM), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kept": 0}, "num_kept"),
        ({"estimate_dim": 0}, "estimate_dim"),
        ({"estimate_dim": 5}, "even"),
        ({"estimate_dim": 6, "causal": True}, "multiple of 4"),
        ({"scope": "row"}, "scope"),
        ({"scope": "head", "causal": True}, "compete"),
        ({"max_len": 0, "causal": True}, "max_len"),
        ({"feature_factor": 0}, "feature_factor"),
        ({"num_kv_heads": 1}, "num_kv_heads"),
        ({"position": "alibi"}, "position"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("sea", DIM, HEADS, **{"estimate_dim": K, **options})
