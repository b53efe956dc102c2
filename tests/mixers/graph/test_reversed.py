"""Reversed attention by its definition, its messages over layers, and its tree."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import UnsupportedError, create_mixer, record
from attnlab.mixers.graph.reversed import dependency_tree
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 8, 2


def _definition(mixer, x: Tensor, children: Tensor, parents: Tensor, senders: Tensor, before: Tensor | None = None) -> Tensor:
    d, out = DIM // HEADS, []
    for b in range(len(x)):
        y = torch.zeros(x.shape[1], DIM, dtype=x.dtype)
        for i in [i for i in range(children.shape[1]) if senders[b, i]]:
            child = children[b, i]
            hidden = [(w * child).sum() for w in mixer.controller_in.weight]
            hidden = torch.stack([u / 2 * (1 + torch.erf(u / math.sqrt(2))) for u in hidden])
            message = 1 / (1 + torch.exp(-(mixer.controller_out.weight[0] * hidden).sum()))
            message = message if before is None else before[b, i] * message
            picks = [torch.exp((w * child).sum() / mixer.temperature) for w in mixer.head_selector.weight]
            for h in range(HEADS):
                s = slice(h * d, (h + 1) * d)
                q, v = mixer.q_proj(child)[s], mixer.v_proj(child)[s]
                here = [j for j in range(x.shape[1]) if parents[b, j]]
                powers = {j: torch.exp((q * mixer.k_proj(x[b, j])[s]).sum() / math.sqrt(d)) for j in here}
                for j in here:
                    share = powers[j] / sum(powers.values()) * picks[h] / sum(picks) * message
                    y = y + torch.eye(len(y), dtype=x.dtype)[j, :, None] * torch.cat(
                        [share * v if g == h else torch.zeros(d, dtype=x.dtype) for g in range(HEADS)]
                    )
        out.append(mixer.out_proj(y) * parents[b, :, None])
    return torch.stack(out)


@pytest.mark.tier("T2", "mixer:reversed")
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "temperature": 0.7, "out_bias": False}])
@pytest.mark.parametrize("masked", [False, True])
def test_reversed(options, masked) -> None:
    mixer = build("reversed", DIM, HEADS, **options)
    real = torch.ones(2, 4, dtype=torch.bool)
    if masked:
        real[0, 1] = real[1, 0] = real[1, 3] = False

    def definition(x: Tensor) -> Tensor:
        return _definition(mixer, x * real[..., None], x * real[..., None], real, real)

    assert_defined_by(mixer, definition, tokens(4, DIM), mask=real if masked else None)


@pytest.mark.tier("T2", "mixer:reversed")
def test_children_in_a_context() -> None:
    mixer, context = build("reversed", DIM, HEADS), tokens(3, DIM).detach()
    parents, senders = torch.ones(2, 4, dtype=torch.bool), torch.tensor([[True, False, True], [False, False, True]])

    def definition(x: Tensor) -> Tensor:
        return _definition(mixer, x, context, parents, senders)

    assert_defined_by(mixer, definition, tokens(4, DIM), context=context, context_mask=senders)


def test_messages_fall_over_the_layers() -> None:
    first, second = build("reversed", DIM, HEADS), build("reversed", DIM, HEADS, temperature=0.3)
    x = tokens(4, DIM)
    real = torch.tensor([[True, True, False, True], [True] * 4])
    h, messages = first.pass_messages(x, mask=real)
    torch.testing.assert_close(h, first(x, mask=real), rtol=0, atol=0)
    y, after = second.pass_messages(h, messages, mask=real)
    torch.testing.assert_close(y, _definition(second, h, h, real, real, messages), rtol=1e-10, atol=1e-12)
    assert (after[real] < messages[real]).all() and after[0, 2] == messages[0, 2] == 0.0
    (gradient,) = torch.autograd.grad(y.sum(), first.controller_out.weight)
    assert gradient.abs().max() > 0
    with pytest.raises(ValueError, match=r"messages: expected shape \(2, 4\), got \(2, 3\)"):
        first.pass_messages(x, messages[:, :3])


def test_what_is_sent_is_received() -> None:
    mixer, x = build("reversed", DIM, HEADS), tokens(5, DIM)
    real = torch.tensor([[True, True, False, True, True], [True] * 5])
    with record(mixer) as tape:
        _, messages = mixer.pass_messages(x, torch.rand(2, 5, dtype=torch.float64), mask=real)
    mass = tape["dependency_mask"]
    torch.testing.assert_close(mass.sum(dim=1), messages)  # a column: what i sends over all receivers
    torch.testing.assert_close(mass.sum(dim=2), tape["prune_score"])
    assert (tape["prune_score"][~real] == 0).all()


def test_tree_by_hand() -> None:
    mass = torch.tensor([[[0.1, 0.7, 0.2], [0.8, 0.1, 0.1], [0.1, 0.2, 0.7]]])
    assert dependency_tree(mass).tolist() == [[1, 0, 2]]  # 0 and 1 send to each other, 2 is a root
    assert dependency_tree(mass, mask=torch.tensor([[True, False, True]])).tolist() == [[0, -1, 2]]


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="causal=True"):
        create_mixer("reversed", 8, 2, causal=True)
    with pytest.raises(UnsupportedError, match="pair_mask"):
        create_mixer("reversed", 8, 2)(torch.randn(1, 3, 8), pair_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"temperature: expected a positive number, got 0\.0"):
        create_mixer("reversed", 8, 2, temperature=0.0)
