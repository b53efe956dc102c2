"""The contract of objectives, and attention diversity by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attnlab import create_mixer, record
from attnlab.objectives import Objective, create_objective, list_objectives, objective_info


def _maps(*sizes: int, layers: int = 2) -> list[Tensor]:
    return [(2.0 * torch.randn(sizes, dtype=torch.float64)).softmax(-1).requires_grad_() for _ in range(layers)]


def _definition(layers: list[Tensor], threshold: float, mask: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for maps in layers:
        cosines = []
        for e in range(maps.shape[0]):
            queries = [i for i in range(maps.shape[2]) if mask[e, i]]
            rows = {i: sum(maps[e, h, i] for h in range(maps.shape[1])) / maps.shape[1] for i in queries}
            mean = sum(rows.values()) / len(rows)
            floor = threshold / int(mask[e].sum())
            low = torch.where(mean > floor, mean, torch.zeros_like(mean))
            for row in rows.values():
                high = torch.where(row > floor, row, torch.zeros_like(row))
                product = (low * high).sum()
                lengths = [math.sqrt(max(float((part.detach() ** 2).sum()), 0.0)) for part in (low, high)]
                if min(lengths) == 0.0:
                    cosines.append(product * 0.0)
                else:
                    cosines.append(product / (torch.sqrt((low**2).sum()) * torch.sqrt((high**2).sum())))
        total = total + sum(cosines) / len(cosines)
    return total / (len(layers) + 1e-6)


@pytest.mark.tier("T2", "objective:attention_diversity")
@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_diversity(masked, threshold) -> None:
    layers = _maps(3, 2, 7, 7)
    mask = torch.ones(3, 7, dtype=torch.bool)
    if masked:
        mask[0, 5:] = mask[1, :2] = mask[2, 3] = False
    ours = create_objective("attention_diversity", threshold=threshold)(layers, mask=mask if masked else None)
    theirs = _definition(layers, threshold, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0.0)
    for a, b in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_one_example_is_averaged_over_its_queries() -> None:
    objective, maps = create_objective("attention_diversity"), _maps(2, 2, 6, 6, layers=1)[0]
    apart = [objective([maps[e : e + 1]]) for e in range(2)]
    torch.testing.assert_close(objective([maps]), sum(apart) / 2)


def test_the_same_attention_everywhere_is_the_worst() -> None:
    objective = create_objective("attention_diversity")
    same = torch.zeros(1, 1, 8, 8)
    same[..., 3] = 1.0
    assert float(objective([same])) == pytest.approx(1.0, abs=1e-5)
    assert float(objective([torch.eye(8)[None, None]])) == 0.0  # the mean is even, and nothing of it exceeds twice 1 / 8


def test_what_stands_at_masked_queries_makes_no_difference() -> None:
    maps, mask = _maps(1, 2, 5, 5, layers=1)[0].detach(), torch.tensor([[True, True, True, False, False]])
    objective = create_objective("attention_diversity", threshold=1.0)
    poisoned = maps.clone()
    poisoned[:, :, 3:] = float("nan")
    assert torch.equal(objective([poisoned], mask=mask), objective([maps], mask=mask))


def test_it_reads_every_layer_and_its_gradient_reaches_the_parameters() -> None:
    model = nn.Sequential(*(create_mixer("softmax", 8, 2) for _ in range(3))).double()
    objective = create_objective("attention_diversity", threshold=1.0)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    with record(model, only=[objective.reads]) as tape:
        model(x)
    loss = objective(tape)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(objective([tape[f"{i}/attention"] for i in range(3)]).detach()))
    for mixer in model:
        assert float(mixer.q_proj.weight.grad.abs().max()) > 0


def test_minimising_it_makes_attention_diverse() -> None:
    torch.manual_seed(0)
    mixer, objective = create_mixer("softmax", 16, 2), create_objective("attention_diversity", threshold=1.0)
    x = torch.randn(4, 12, 16) + 3.0  # a common part on which all tokens agree
    optimizer, losses = torch.optim.Adam(mixer.parameters(), lr=1e-2), []
    for _ in range(30):
        with record(mixer, only=[objective.reads]) as tape:
            mixer(x)
        losses.append(objective(tape))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < 0.7 * float(losses[0].detach())


def test_it_is_registered() -> None:
    assert "attention_diversity" in list_objectives("attention*")
    assert objective_info("attention_diversity").paper == "tap-adl"


def test_bad_input() -> None:
    objective, mixer = create_objective("attention_diversity"), create_mixer("softmax", 8, 2)
    with pytest.raises(ValueError, match="threshold"):
        create_objective("attention_diversity", threshold=-1.0)
    with record(mixer, detach=True) as tape:
        mixer(torch.randn(1, 3, 8))
    with pytest.raises(ValueError, match="detach=False"):
        objective(tape)
    with record(mixer, only=["values"]) as tape:
        mixer(torch.randn(1, 3, 8))
    with pytest.raises(ValueError, match="'attention' of at least one layer"):
        objective(tape)
    with pytest.raises(ValueError, match=r"maps \(b, h, n, m\)"):
        objective([torch.ones(3, 3)])
    with pytest.raises(ValueError, match="mask"):
        objective([torch.ones(1, 1, 3, 3)], mask=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="implement measure"):
        Objective()([torch.ones(1)])
