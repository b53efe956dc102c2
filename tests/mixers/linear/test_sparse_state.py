"""Sparse state expansion by its definition on both rules, and what routing may and may not change."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer, record
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 8, 2


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _write(mixer, branch: int, token: Tensor, state: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The state (h, d, e) after one token."""
    decay = mixer.decays[branch]
    if mixer.rule == "gla":
        left = torch.sigmoid(decay.up(decay.down(token)).view(HEADS, -1)) ** (1 / 16)
        return left[..., None] * state + k[..., None] * v[:, None]
    step = torch.log1p(torch.exp(decay.proj(token) + decay.bias))
    state = torch.exp(-decay.A_log.exp() * step)[:, None, None] * state
    beta = torch.sigmoid(mixer.b_proj(token)).view(2, HEADS)[branch]
    return state + beta[:, None, None] * k[..., None] * (v - (k[..., None] * state).sum(1))[:, None]


def _definition(mixer, x: Tensor, real: Tensor) -> Tensor:
    out, d = [], mixer.key_dim
    for example, counts in zip(x, real, strict=True):
        states = [torch.zeros(HEADS, d, mixer.value_dim, dtype=x.dtype) for _ in range(mixer.num_partitions + 1)]
        rows = []
        for token, here in zip(example, counts, strict=True):
            if not here:
                rows.append(torch.zeros(DIM, dtype=x.dtype))
                continue
            q, k, v = (layer(token) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            eta = mixer.e_proj(token).exp() / mixer.e_proj(token).exp().sum()
            order = eta.argsort(descending=True)
            read = torch.zeros(HEADS, mixer.value_dim, dtype=x.dtype)
            for n, state in enumerate(states):
                write = n == 0 or n - 1 in order[: mixer.num_writers]
                if not write and n - 1 not in order[: mixer.num_readers]:
                    continue
                branch = min(n, 1)
                qn = F.silu((q + branch * mixer.q_correction(token)).view(HEADS, d))
                kn = (k + branch * mixer.k_correction(token)).view(HEADS, d)
                kn = kn.exp() / kn.exp().sum(-1, keepdim=True) if mixer.rule == "gla" else F.silu(kn)
                weight = eta[n - 1] if n else 1.0
                if mixer.rule == "gdn":
                    qn, kn = (weight * _unit(t) if mixer.weigh_unit else _unit(weight * t) for t in (qn, kn))
                else:
                    qn, kn = weight * qn, weight * kn
                if write:
                    states[n] = state = _write(mixer, branch, token, state, kn, F.silu(v).view(HEADS, -1))
                if n == 0 or n - 1 in order[: mixer.num_readers]:
                    read = read + (qn[..., None] * state).sum(1) / math.sqrt(d)
            read = read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.out_norm.weight
            rows.append(mixer.out_proj(read.flatten() * F.silu(mixer.g_proj(token))))
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.tier("T2", "mixer:sparse_state_expansion")
@pytest.mark.parametrize("options", [{}, {"rule": "gdn"}, {"rule": "gdn", "weigh_unit": True}], ids=str)
@pytest.mark.parametrize("sizes", [(4, 1, 1), (3, 2, 1), (4, 1, 3)], ids=str)
def test_definition(options, sizes) -> None:
    partitions, writers, readers = sizes
    mixer = build(
        "sparse_state_expansion",
        DIM,
        HEADS,
        num_partitions=partitions,
        num_writers=writers,
        num_readers=readers,
        head_dim=3,
        expand_v=2.0,
        **options,
    )
    real = torch.tensor([[True] * 7, [False, True, True, False, True, True, False]])
    x = tokens(7, DIM)
    assert_defined_by(mixer, lambda x: _definition(mixer, x * real[..., None], real), x, mask=real)


def test_a_partition_that_is_not_chosen_keeps_its_state() -> None:
    mixer = build("sparse_state_expansion", DIM, HEADS)
    x = tokens(20, DIM, batch=1).detach()
    with torch.no_grad():
        _, state = mixer.extend(x[:, :19], mixer.init_state(1))
        with record(mixer, only=["routing"]) as tape:
            _, after = mixer.extend(x[:, 19:], state)
    chosen = int(tape["routing"].argmax())
    changed = [not torch.equal(a, b) for a, b in zip(state["partitions"][0], after["partitions"][0], strict=True)]
    assert changed == [n == chosen for n in range(4)]


def test_the_state_grows_with_the_partitions_and_the_parameters_do_not() -> None:
    few, many = (create_mixer("sparse_state_expansion", 64, 4, num_partitions=n) for n in (2, 16))
    assert many.init_state(1)["partitions"].numel() == 8 * few.init_state(1)["partitions"].numel()
    parameters = [sum(p.numel() for p in mixer.parameters()) for mixer in (few, many)]
    assert parameters[1] - parameters[0] == 64 * 14  # rows of the router


def test_the_balance_loss_is_least_when_partitions_are_used_alike() -> None:
    mixer = build("sparse_state_expansion", DIM, HEADS, num_partitions=2)
    with torch.no_grad():
        mixer.e_proj.weight.zero_()
        mixer.e_proj.weight[0, 0], mixer.e_proj.weight[1, 0] = 1.0, -1.0
    losses = []
    for signs in ([1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]):
        x = torch.zeros(1, 4, DIM, dtype=torch.float64)
        x[0, :, 0] = torch.tensor(signs)
        with record(mixer, only=["balance_loss"]) as tape:
            mixer(x)
        losses.append(float(tape["balance_loss"].detach()))
    assert losses[0] == pytest.approx(1.0)
    assert losses[1] == pytest.approx(2 / (1 + math.exp(-2.0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rule": "gated"}, "rule"), ({"num_writers": 4}, "num_writers"), ({"num_readers": 0}, "num_readers")],
    ids=str,
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("sparse_state_expansion", DIM, HEADS, **options)
