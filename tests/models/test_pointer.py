"""The pointer network: steps do not see later answers, padding is inert, decoding repeats teacher forcing."""

from __future__ import annotations

import pytest
import torch

from attnlab.core.errors import UnsupportedError
from attnlab.models import create_model
from attnlab.models.pointer import END, greedy_answers


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("pointer", input_dim=2, dim=16, depth=2, num_heads=2, dtype=torch.float64)


def example(batch=3, n=6, m=5):
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(batch, n, 2, generator=generator, dtype=torch.float64)
    answers = torch.randint(1, n + 1, (batch, m), generator=generator)
    return points, answers


def test_logits_are_the_score_of_the_equation(model):
    points, answers = example()
    logits = model(answers, context=points)
    encoded, state = model.encode(points)
    read = torch.cat((model.start.expand(3, 1, -1), encoded), 1)
    states, _ = model.decoder(torch.stack([row[chosen] for row, chosen in zip(read, answers, strict=True)]), state)
    asked = torch.cat((model.end.expand(3, 1, -1), encoded), 1)
    for i in range(5):
        for j in range(7):
            hidden = torch.tanh(asked[:, j] @ model.keys.weight.T + states[:, i] @ model.queries.weight.T)
            torch.testing.assert_close(logits[:, i, j], hidden @ model.score.weight[0], rtol=1e-10, atol=1e-12)


def test_steps_do_not_see_later_answers(model):
    points, answers = example()
    changed = answers.clone()
    changed[:, 3:] = 1
    first, second = model(answers, context=points), model(changed, context=points)
    assert torch.equal(first[:, :3], second[:, :3])


def test_padding_points_change_nothing_and_are_never_answered(model):
    points, answers = example()
    padded = torch.cat((points, torch.full((3, 2, 2), float("nan"), dtype=torch.float64)), 1)
    mask = torch.arange(8).expand(3, 8) < 6
    alone = model(answers, context=points)
    logits = model(answers, context=padded, context_mask=mask)
    torch.testing.assert_close(logits[..., :7], alone, rtol=1e-9, atol=1e-12)
    assert (logits[..., 7:] == torch.finfo(torch.float64).min).all()
    assert (logits.softmax(-1)[..., 7:] == 0).all()


def test_greedy_answers_are_the_likeliest_given_those_before(model):
    points, _ = example(batch=20)
    found = greedy_answers(model, points, 8)
    before = torch.cat((torch.zeros(20, 1, dtype=torch.int64), found[:, :-1]), 1)
    logits = model(before, context=points)
    going = (before[:, 1:] != END).cumprod(1).bool()
    going = torch.cat((going.new_ones(20, 1), going), 1)
    assert torch.equal(found[going], logits.argmax(-1)[going])
    assert (found[~going] == END).all()


def test_restricted_answers(model):
    points, _ = example(batch=20)
    mask = torch.arange(6) < torch.tensor([4, 6]).repeat(10)[:, None]
    found = greedy_answers(model, points, 7, mask=mask, once=True, fixed_length=True)
    for row, size in zip(found.tolist(), mask.sum(1).tolist(), strict=True):
        assert sorted(row[:size]) == list(range(1, size + 1)) and set(row[size:]) == {END}
    once = greedy_answers(model, points, 7, once=True)
    for row in once.tolist():
        points_answered = [one for one in row if one != END]
        assert len(set(points_answered)) == len(points_answered)
    assert model.training


def test_bad_input(model):
    points, answers = example()
    with pytest.raises(ValueError, match="num_steps, fixed_length"):
        greedy_answers(model, points, 3, fixed_length=True)
    with pytest.raises(ValueError, match="num_steps, fixed_length"):
        greedy_answers(model, points, 0)
    with pytest.raises((ValueError, TypeError), match="context_mask"):  # a TypeError where annotations are checked
        model(answers, context=points, context_mask=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(UnsupportedError):
        create_model("pointer", input_dim=2, dim=16, depth=1, mixer="multi_axis", num_heads=2)


@pytest.mark.parametrize("mixer", ["delta_net", "mamba", "linear", "agent"])
def test_any_mixer_encodes(mixer):
    model = create_model("pointer", input_dim=2, dim=16, depth=1, mixer=mixer, max_length=6, num_heads=2)
    points, answers = example()
    logits = model(answers, context=points.float())
    logits.sum().backward()
    assert logits.shape == (3, 5, 7) and all(p.grad is not None for p in model.parameters())
