"""Language models whose maps come from another stream: what that stream is, and what maps depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import record
from attnlab.models import CausalLM
from attnlab.models.independent_maps import IndependentMaps

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
SOURCES = {
    "static_embedding": {},
    "random_embedding": {"length": 8, "std": 1.0},
    "fixed_sequence": {"sequence": [7, 2, 0, 6, 1, 3, 9, 4]},
}


def _model(depth: int = 3, mixer="independent_map", **options) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(10, 16, depth, mixer, 2, dtype=torch.float64, **options)


def _wrapped(source: str, **options) -> IndependentMaps:
    return IndependentMaps(_model(**options), source, generator=torch.Generator().manual_seed(4), **SOURCES[source])


def _by_hand(wrapped: IndependentMaps, ids: Tensor) -> Tensor:
    """Two streams side by side, layer after layer."""
    model, n = wrapped.model, ids.shape[1]
    x = embedded = model.embedding(ids)
    other = {
        "static_embedding": lambda: embedded,
        "random_embedding": lambda: wrapped.noise[:, :n],
        "fixed_sequence": lambda: model.embedding(wrapped.sequence[:, :n]),
    }[wrapped.source]()
    for block in model.blocks:
        source = block.mixer_norm(other)
        if block.mixer.info.name == "independent_map":
            x = x + block.mixer.mix_from(block.mixer_norm(x), source)
        else:
            x = x + block.mixer(block.mixer_norm(x))
        x = x + block.channel_mixer(block.channel_norm(x))
        other = other if wrapped.source == "static_embedding" else _plain(block, other)
    return torch.nn.functional.linear(model.norm(x), model.embedding.weight)


def _plain(block, x: Tensor) -> Tensor:
    x = x + block.mixer(block.mixer_norm(x))
    return x + block.channel_mixer(block.channel_norm(x))


@pytest.mark.parametrize("mixer", ["independent_map", ("independent_map", "softmax"), ("softmax", "independent_map")])
@pytest.mark.parametrize("source", SOURCES)
def test_two_streams_by_hand(source, mixer) -> None:
    wrapped = _wrapped(source, mixer=mixer)
    ours, theirs = wrapped(IDS), _by_hand(wrapped, IDS)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    leaves = list(wrapped.parameters())
    direction = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_one_static_layer_is_plain_attention() -> None:
    wrapped = _wrapped("static_embedding", depth=1)
    torch.testing.assert_close(wrapped(IDS), wrapped.model(IDS), rtol=0, atol=0)
    wrapped = _wrapped("static_embedding", depth=2)
    assert not torch.allclose(wrapped(IDS), wrapped.model(IDS))


@pytest.mark.parametrize("source", SOURCES)
def test_what_maps_depend_on(source) -> None:
    wrapped = _wrapped(source)
    with record(wrapped, only=["attention"]) as tape:
        wrapped(IDS)
    for maps in tape.matching("attention").values():
        assert torch.equal(maps[0], maps[1]) == (source != "static_embedding")


@pytest.mark.parametrize("source", SOURCES)
def test_causal_and_safe_from_padding(source) -> None:
    wrapped = _wrapped(source)
    whole = wrapped(IDS)
    changed = IDS.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(wrapped(changed)[:, :4], whole[:, :4])
    padded = torch.cat((torch.full((2, 2), 8), IDS), dim=1)
    mask = torch.arange(8).expand(2, -1) >= 2
    torch.testing.assert_close(wrapped(padded, mask=mask)[:, 2:], whole)


@pytest.mark.parametrize("source", SOURCES)
def test_a_stream_that_is_kept(source) -> None:
    wrapped = _wrapped(source).eval()
    expected = wrapped(IDS)
    wrapped.precompute()
    torch.testing.assert_close(wrapped(IDS), expected)
    with torch.no_grad():
        wrapped.model.blocks[0].mixer.v_proj.weight.mul_(3.0)
    fresh = wrapped.train()(IDS)
    torch.testing.assert_close(fresh, _by_hand(wrapped, IDS))


def test_the_model_is_left_as_it_was() -> None:
    wrapped = _wrapped("random_embedding")
    before = wrapped.model(IDS)
    wrapped(IDS)
    with pytest.raises(ValueError, match="tokens: expected at most 8 as the fixed stream has, got 9"):
        wrapped(torch.zeros(1, 9, dtype=torch.int64))
    torch.testing.assert_close(wrapped.model(IDS), before, rtol=0, atol=0)
    again = IndependentMaps(_model(), "random_embedding", length=8, std=1.0)
    again.load_state_dict(wrapped.state_dict())
    torch.testing.assert_close(again(IDS), wrapped(IDS), rtol=0, atol=0)  # what was drawn is saved


def test_refusals() -> None:
    for options, message in (
        ({"source": "static"}, "source: expected one of"),
        ({"source": "random_embedding"}, "length: expected a positive integer with source='random_embedding', got None"),
        ({"source": "fixed_sequence"}, "sequence: expected token ids with source='fixed_sequence', got none"),
    ):
        with pytest.raises(ValueError, match=message):
            IndependentMaps(_model(), **options)
    with pytest.raises(ValueError, match="model: expected at least one 'independent_map' mixer, got none"):
        IndependentMaps(_model(mixer="softmax"))
