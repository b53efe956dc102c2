"""Transition distillation by its definition."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab.objectives import create_objective
from attnlab.objectives.transition_distillation import count_transitions

SEQUENCES = torch.tensor([[0, 1, 2, 1], [2, 2, 9, 1], [9, 9, 3, 0]])
MASK = SEQUENCES < 9


def test_transitions_skip_padding_and_stay_in_their_sequence() -> None:
    counts = count_transitions(SEQUENCES, 4, mask=MASK)
    expected = torch.zeros(4, 4)
    for a, b in ((0, 1), (1, 2), (2, 1), (2, 2), (2, 1), (3, 0)):
        expected[a, b] += 1
    assert torch.equal(counts, expected)
    with pytest.raises(ValueError, match="sequences"):
        count_transitions(SEQUENCES, 4)


@pytest.mark.tier("T2", "objective:transition_distillation")
def test_definition() -> None:
    counts = count_transitions(SEQUENCES, 5, mask=MASK).double()  # item 4 never comes
    objective = create_objective("transition_distillation", counts=counts, temperature=0.4)
    items = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def definition() -> torch.Tensor:
        losses = []
        for i in range(4):
            exponents = [math.exp(float(counts[i, j] / counts[i].max()) / 0.4) for j in range(5)]
            scores = torch.stack([torch.exp(math.sqrt(3) * items[i] @ items[j] / 0.4) for j in range(5)])
            losses.append(-sum(e / sum(exponents) * torch.log(scores[j] / scores.sum()) for j, e in enumerate(exponents)))
        return sum(losses) / 4

    ours, theirs = objective([items]), definition()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    a, b = (torch.autograd.grad(loss, items)[0] for loss in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(objective([items.detach(), items]), ours)


def test_embeddings_learn_the_transitions_of_a_chain() -> None:
    torch.manual_seed(0)
    walk = torch.arange(60).remainder(6)[None]  # 0 1 2 3 4 5 0 ...
    counts = count_transitions(walk, 6)
    objective = create_objective("transition_distillation", counts=counts)
    items = (0.1 * torch.randn(6, 4)).requires_grad_()
    optimizer = torch.optim.Adam([items], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        objective([items]).backward()
        optimizer.step()
    scores = (items @ items.T).detach()
    for i in range(6):  # scores are symmetric, so an item and the one before it may score as high as the one that follows
        others = [j for j in range(6) if j not in (i, (i + 1) % 6, (i - 1) % 6)]
        assert float(scores[i, (i + 1) % 6]) > float(scores[i, others].max())


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="counts"):
        create_objective("transition_distillation", counts=-torch.ones(2, 2))
    with pytest.raises(ValueError, match="temperature"):
        create_objective("transition_distillation", counts=torch.ones(2, 2), temperature=0.0)
    objective = create_objective("transition_distillation", counts=torch.ones(2, 2))
    with pytest.raises(ValueError, match="recorded"):
        objective([torch.ones(3, 2)])
    with pytest.raises(ValueError, match="mask"):
        objective([torch.ones(2, 2)], mask=torch.ones(2, 2, dtype=torch.bool))
