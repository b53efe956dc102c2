"""Flow attention by its definition, sum by sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer, record
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS, EPS = 8, 2, 1e-6
D = DIM // HEADS
MAPS = {"sigmoid": lambda t: 1 / (1 + torch.exp(-t)), "relu": lambda t: t.clamp(min=0)}


def _meet(a: Tensor, total: Tensor) -> Tensor:
    return ((a + EPS) * (total + EPS)).sum()


def _full(q: dict[int, Tensor], k: dict[int, Tensor], v: dict[int, Tensor]) -> dict[int, Tensor]:
    """The output at each query, all of which see all keys."""
    n, m = len(q), len(k)
    s_in = {i: 1 / _meet(q[i], sum(k.values())) for i in q}
    s_out = {j: 1 / _meet(k[j], sum(q.values())) for j in k}
    i_hat = {i: _meet(q[i], sum(k[j] * s_out[j] for j in k)) for i in q}
    o_hat = {j: _meet(k[j], sum(q[i] * s_in[i] for i in q)).clamp(-1, 1) for j in k}
    comp = {j: m * torch.exp(o_hat[j]) / sum(torch.exp(o) for o in o_hat.values()) for j in k}
    pooled = sum(k[j][:, None] * (v[j] * comp[j])[None] for j in k)
    return {i: torch.sigmoid(i_hat[i] * n / m) * (q[i] * s_in[i]) @ pooled for i in q}


def _causal(q: dict[int, Tensor], k: dict[int, Tensor], v: dict[int, Tensor]) -> dict[int, Tensor]:
    places = list(q)
    out, s_in, s_out, exps = {}, {}, {}, {}
    pooled = torch.zeros(D, D, dtype=torch.float64)
    for count, t in enumerate(places, start=1):
        past = places[:count]
        s_in[t] = count / _meet(q[t], sum(k[j] for j in past))
        s_out[t] = count / _meet(k[t], sum(q[i] for i in past))
        i_hat = _meet(q[t], sum(k[j] * s_out[j] for j in past)) / count
        exps[t] = torch.exp((_meet(k[t], sum(q[i] * s_in[i] for i in past)) / count).clamp(-1, 1))
        comp = exps[t] / sum(exps[j] for j in past) * count
        pooled = pooled + k[t][:, None] * (v[t] * comp)[None]
        out[t] = torch.sigmoid(i_hat) * (q[t] * s_in[t] / count) @ pooled
    return out


def definition(mixer, x: Tensor, context: Tensor, phi, real: Tensor | None = None, key_real: Tensor | None = None) -> Tensor:
    y = []
    for b in range(x.shape[0]):
        q = phi(mixer.q_proj(x[b])).view(-1, HEADS, D)
        k, v = (layer(context[b]).view(-1, HEADS, D) for layer in (mixer.k_proj, mixer.v_proj))
        k = phi(k)
        queries = [i for i in range(len(q)) if real is None or real[b, i]]
        keys = [j for j in range(len(k)) if key_real is None or key_real[b, j]]
        rows = torch.zeros(len(q), DIM, dtype=x.dtype)
        heads = []
        for h in range(HEADS):
            sides = ({i: q[i, h] for i in queries}, {j: k[j, h] for j in keys}, {j: v[j, h] for j in keys})
            heads.append((_causal if mixer.causal else _full)(*sides))
        outputs = [mixer.out_proj(torch.cat([head[i] for head in heads])) for i in queries]
        rows = rows.index_put((torch.tensor(queries),), torch.stack(outputs))
        y.append(rows)
    return torch.stack(y)


@pytest.mark.tier("T2", "mixer:flow")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["sigmoid", "relu"])
def test_flow(causal, feature_map) -> None:
    mixer = build("flow", DIM, HEADS, causal=causal, feature_map=feature_map)
    assert_defined_by(mixer, lambda x: definition(mixer, x, x, MAPS[feature_map]), tokens(7, DIM))


@pytest.mark.tier("T2", "mixer:flow")
@pytest.mark.parametrize("causal", [False, True])
def test_masked_tokens_are_in_no_sum(causal) -> None:
    mixer = build("flow", DIM, HEADS, causal=causal)
    real = torch.tensor([[False, True, True, False, True, True], [True, False, False, True, True, False]])
    assert_defined_by(mixer, lambda x: definition(mixer, x, x, MAPS["sigmoid"], real, real), tokens(6, DIM), mask=real)


@pytest.mark.tier("T2", "mixer:flow")
def test_from_another_sequence() -> None:
    mixer, context = build("flow", DIM, HEADS), tokens(4, DIM).detach()
    real, key_real = torch.rand(2, 6) < 0.7, torch.rand(2, 4) < 0.7
    real[:, 0] = key_real[:, 1] = True

    def expected(x: Tensor) -> Tensor:
        return definition(mixer, x, context, MAPS["sigmoid"], real, key_real)

    assert_defined_by(mixer, expected, tokens(6, DIM), context=context, mask=real, context_mask=key_real)


def test_every_competition_is_on_the_average_one() -> None:
    mixer, x = build("flow", DIM, HEADS), tokens(9, DIM)
    with record(mixer, only=("competition", "allocation")) as tape:
        mixer(x)
    torch.testing.assert_close(tape["competition"].mean(-1), torch.ones(2, HEADS, dtype=torch.float64))
    assert tape["allocation"].shape == (2, HEADS, 9)


def test_long_streams_are_finite_in_float32() -> None:
    mixer = create_mixer("flow", DIM, HEADS, causal=True)
    state, x = mixer.init_state(1), torch.randn(1, 3000, DIM)
    whole = mixer(x)
    y, state = mixer.extend(x[:, :2999], state)
    last, state = mixer.extend(x[:, 2999:], state)
    assert int(state["number"]) == 3000
    torch.testing.assert_close(torch.cat((y, last), 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "identity"}, "feature_map: expected one of"),
        ({"eps": 0.0}, "eps: expected a positive number"),
        ({"num_kv_heads": 1}, "num_kv_heads: expected 2"),
        ({"position": "rotary"}, "position: expected 'none'"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("flow", DIM, HEADS, **options)
