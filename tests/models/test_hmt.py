from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attnlab
from attnlab.models import CausalLM, create_model, model_info
from attnlab.models.hmt import HierarchicalMemory, HierarchicalMemoryLM
from attnlab.models.memory_recall import MemoryRecall, recalled_age, retrieval_loss

D = torch.float64
DIM = 6


class Toy(nn.Module):
    """A causal map: every token sees the mean of the real ones up to itself."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(dim, dim, dtype=D), nn.Linear(dim, dim, dtype=D)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        real = torch.ones(x.shape[:2], dtype=D) if mask is None else mask.to(D)
        mean = (x * real[..., None]).cumsum(1) / real.cumsum(1).clamp(min=1)[..., None]
        return torch.tanh(self.a(x) + self.b(mean))


def make(**options) -> HierarchicalMemory:
    torch.manual_seed(3)
    given = {"segment": 4, "memory_size": 2, "num_preserved": 2, "unroll": None, "dtype": D}
    model = HierarchicalMemory(Toy(), DIM, **(given | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def definition(model: HierarchicalMemory, x: Tensor) -> Tensor:
    """The paper's four steps for one example, segment after segment."""
    f = lambda rows: model.backbone(torch.stack(rows)[None])[0]  # noqa: E731
    memories: list[Tensor] = []
    before: list[Tensor] = []
    query, outputs = None, []
    for start in range(0, len(x), model.segment):
        tokens = list(x[start : start + model.segment])
        if model.summary == "current":
            query = f([model.prompt, *tokens[: model.summary_length], model.prompt])[-1]
        recalled = model.first_memory
        if memories:
            q = model.recall.q_proj.weight @ query
            scores = torch.stack([q @ (model.recall.k_proj.weight @ p) * model.recall.scale for p in memories])
            recalled = sum(w * p for w, p in zip(scores.softmax(0), memories, strict=True))
        preserved = before[len(before) - min(model.num_preserved, len(before)) :]
        hidden = f([recalled, *preserved, *tokens, recalled])
        outputs += list(hidden[1 + len(preserved) : -1])
        memories = [*memories, hidden[-1]][-model.memory_size :]
        before = before + tokens
        query = f([model.prompt, *tokens[-model.summary_length :], model.prompt])[-1]
    return torch.stack(outputs)


@pytest.mark.tier("T2", "model:hmt")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_preserved": 0, "summary_fraction": 1.0, "memory_size": 1},
        {"num_preserved": 7, "summary": "previous", "recall_dim": 3, "recall_scale": "width", "memory_size": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [3, 4, 18])
def test_equals_the_four_steps(options, n):
    model, x = make(**options), torch.randn(2, n, DIM, dtype=D, requires_grad=True)
    ours, theirs = model(x), torch.stack([definition(model, one) for one in x])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    weight = torch.randn_like(ours)
    leaves = [x, *model.parameters()]
    pairs = zip(
        torch.autograd.grad((ours * weight).sum(), leaves, materialize_grads=True, allow_unused=True),
        torch.autograd.grad((theirs * weight).sum(), leaves, materialize_grads=True, allow_unused=True),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("summary", ["current", "previous"])
def test_masked_tokens_are_as_if_they_were_not_there(summary):
    model, x = make(summary=summary), torch.randn(3, 14, DIM, dtype=D)
    mask = torch.rand(3, 14, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[2] = False
    y = model(x.masked_fill(~mask[..., None], float("nan")), mask=mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    for b in range(2):
        torch.testing.assert_close(y[b, mask[b]], model(x[b : b + 1, mask[b]])[0], rtol=1e-9, atol=1e-11)


def test_padding_that_comes_in_one_piece_only_is_no_past_for_the_next():
    model, x = make(), torch.randn(2, 16, DIM, dtype=D)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 4:] = False
    _, state = model.extend(x[:, :8], model.init_state(2), mask=mask)
    y, state = model.extend(x[:, 8:], state)
    alone = model(torch.cat((x[:1, :4], x[:1, 8:]), 1))
    torch.testing.assert_close(y[:1], alone[:, 4:], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(y[1:], model(x[1:])[:, 8:], rtol=1e-9, atol=1e-11)


def test_pieces_of_whole_segments_equal_the_whole_and_the_state_is_bounded():
    model, x = make(), torch.randn(2, 40, DIM, dtype=D)
    state, outputs, sizes = model.init_state(2), [], []
    for piece in x.split(8, 1):
        y, state = model.extend(piece, state)
        outputs.append(y)
        sizes.append(state.nbytes)
    torch.testing.assert_close(torch.cat(outputs, 1), model(x), rtol=1e-9, atol=1e-11)
    assert len(set(sizes)) == 1


def moved(model: HierarchicalMemory, t: int) -> Tensor:
    """How much each token of a sequence of six segments moves output t."""
    x = torch.randn(1, 24, DIM, dtype=D, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0, t].square().sum(), x)
    return gradient[0].abs().amax(-1)


@pytest.mark.parametrize("unroll", [1, 2, 3])
def test_gradients_reach_back_through_the_window_and_no_further(unroll):
    # tokens 16 to 19 are segment 4; nothing is preserved, so that memories alone carry the past
    found = moved(make(unroll=unroll, memory_size=6, num_preserved=0), 19).view(6, 4).amax(-1)
    first = 4 // unroll * unroll
    assert (found[first:5] > 0).all()
    assert float(found[:first].sum()) == 0.0 and float(found[5:].sum()) == 0.0


def test_a_detached_state_cuts_the_past_off():
    model, x = make(), torch.randn(1, 8, DIM, dtype=D, requires_grad=True)
    _, state = model.extend(x[:, :4], model.init_state(1))
    y, _ = model.extend(x[:, 4:], state.detach())
    assert float(torch.autograd.grad(y.sum(), x)[0][:, :4].abs().sum()) == 0.0


def test_only_the_summary_of_the_segment_before_is_causal_by_tokens():
    assert float(moved(make(summary="previous"), 8)[9:].sum()) == 0.0
    # the first token of a segment sees old memories, but how much of which depends on the first half of its segment
    future = moved(make(), 8)[9:]
    assert float(future[0]) > 0 and float(future[1:].sum()) == 0.0


def test_recall_finds_the_segment_that_is_asked_for():
    recall = MemoryRecall(8, dtype=D)
    with torch.no_grad():
        for projection in (recall.q_proj, recall.k_proj):
            projection.weight.copy_(10.0 * torch.eye(8, dtype=D))
    memory = torch.eye(8, dtype=D)[None, :5]
    query = memory[:, 1:3]
    torch.testing.assert_close(recall(query, memory), query, rtol=1e-9, atol=1e-9)
    assert recalled_age(recall.weights(query, memory)).tolist() == [[4, 3]]


def test_recall_in_the_model_is_recorded_and_prefers_the_similar_segment():
    class Last(nn.Module):
        """The mean of all tokens up to each."""

        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]

    model = HierarchicalMemory(Last(), DIM, segment=3, memory_size=4, num_preserved=0, summary_fraction=1.0, dtype=D)
    with torch.no_grad():
        for projection in (model.recall.q_proj, model.recall.k_proj):
            projection.weight.copy_(10.0 * torch.eye(DIM, dtype=D))
    kinds = torch.eye(DIM, dtype=D)[torch.tensor([0, 1, 2, 1])]
    with attnlab.record(model) as tape:
        model(kinds.repeat_interleave(3, 0)[None])
    assert int(tape["recall"].flatten().argmax()) == 2  # the queue: nothing, segments 0, 1, 2


def test_the_retrieval_loss_is_a_cross_entropy():
    weights = torch.tensor([[[0.5, 0.25, 0.25]], [[0.1, 0.2, 0.7]]], dtype=D)
    relevant = torch.tensor([[[0, 1, 1]], [[0, 0, 1]]], dtype=D)
    expected = -(weights[0, 0, 1].log() + weights[1, 0, 2].log()) / 2
    torch.testing.assert_close(retrieval_loss(weights, relevant), expected)
    assert float(retrieval_loss(weights, relevant, twice=True)) > float(expected)
    nothing = torch.zeros_like(relevant)
    assert float(retrieval_loss(weights, nothing)) == 0.0


def language_model(**options) -> CausalLM:
    return CausalLM(11, 8, 2, "softmax", 2, position="sinusoidal", short_conv=3, dtype=D, **options).eval()


def test_the_language_model_is_registered_and_has_logits_at_tokens_alone():
    assert model_info("hmt").paper == "hmt"
    model = create_model("hmt", model=language_model(), segment=4, memory_size=3, num_preserved=2)
    ids = torch.randint(11, (2, 11))
    assert isinstance(model, HierarchicalMemoryLM) and model(ids).shape == (2, 11, 11)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :4], mask[1, 7:] = False, False
    padded = model(ids, mask=mask)
    for b in range(2):
        torch.testing.assert_close(padded[b, mask[b]], model(ids[b : b + 1, mask[b]])[0], rtol=1e-8, atol=1e-10)
    state = model.init_state(2)
    first, state = model.extend(ids[:, :8], state)
    second, _ = model.extend(ids[:, 8:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), model(ids), rtol=1e-8, atol=1e-10)


def test_a_frozen_model_trains_through_its_memory():
    inner = language_model().requires_grad_(False)
    model = HierarchicalMemoryLM(inner, segment=4, memory_size=3, num_preserved=0)
    ids = torch.randint(11, (2, 12))
    torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0}
    assert learned == {"memory.prompt", "memory.first_memory", "memory.recall.q_proj.weight", "memory.recall.k_proj.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, "segment: expected at least 1"),
        ({"memory_size": 0}, "memory_size: expected at least 1"),
        ({"num_preserved": -1}, "num_preserved: expected at least 0"),
        ({"unroll": 0}, "unroll: expected at least 1"),
        ({"summary_fraction": 0.0}, "summary_fraction: expected"),
        ({"summary": "next"}, "summary: expected one of"),
        ({"recall_scale": "none"}, "scale: expected one of"),
        ({"recall_dim": 0}, "hidden: expected at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(TypeError, match="model: expected a CausalLM"):
        create_model("hmt", model=Toy())
    with pytest.raises(ValueError, match="x: expected"):
        make()(torch.zeros(1, 3, DIM + 1, dtype=D))
