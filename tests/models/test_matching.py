"""The matching encoder: one stack for both sequences, nothing between them but their vectors."""

from __future__ import annotations

import pytest
import torch

import attnlab
from attnlab.core.errors import UnknownNameError
from attnlab.models import create_model
from attnlab.models.matching import MatchingEncoder

D = torch.float64
# what they do in an encoder is tested there for all; here, that the stack is used for both sequences with their own masks
MIXERS = ("softmax", "linear", "delta_net", "mamba", "sliding_window", "agent", "pooling", "channel_group")


def options_of(mixer):
    info = attnlab.mixer_info(mixer)
    known = {name: value for name, value in info.example if name != info.supports.tokens_option}
    return known | ({"num_sinks": 0} if mixer == "sliding_window" else {})


def make(mixer="softmax", **options):
    common = {"mixer_options": options_of(mixer), "max_length": 12, "dtype": D}
    return MatchingEncoder(11, 8, 2, mixer, 4, **{**common, **options}).eval()


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_padded_pair_equals_the_unpadded(mixer):
    model = make(mixer)
    one, two = torch.randint(11, (2, 9)), torch.randint(11, (2, 6))
    masks = [torch.arange(12).expand(2, -1) < x.shape[1] for x in (one, two)]
    padded = [torch.cat((x, torch.randint(11, (2, 12 - x.shape[1]))), 1) for x in (one, two)]
    logits = model(padded[0], context=padded[1], mask=masks[0], context_mask=masks[1])
    assert logits.shape == (2, 2) and len(model.blocks) == 2
    torch.testing.assert_close(logits, model(one, context=two), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("combine", ["concat", "nli"])
def test_the_head_is_the_definition(combine):
    model = make(combine=combine, num_classes=3, hidden=6)
    a, b = torch.randint(11, (2, 5)), torch.randint(11, (2, 7))
    one, two = model.encode(a), model.encode(b)
    parts = [one, two] if combine == "concat" else [one, two, one * two, one - two]
    y = torch.cat(parts, 1)
    for layer in model.head:
        y = y.clamp(min=0) if layer is not model.head[0] else y
        y = y @ layer.weight.T + layer.bias
    torch.testing.assert_close(model(a, context=b), y)
    assert [layer.out_features for layer in model.head] == [6, 3, 3]


def test_both_sequences_are_encoded_alike_and_apart():
    model = make()
    a, b = torch.randint(11, (3, 8)), torch.randint(11, (3, 8))
    torch.testing.assert_close(model.encode(torch.cat((a, b)))[3:], model.encode(b), rtol=1e-12, atol=1e-12)
    model(a, context=b).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_refusals():
    with pytest.raises(ValueError, match="hidden: expected an even positive integer, got 5"):
        make(hidden=5)
    with pytest.raises(ValueError, match="pool: expected 'mean' or 'last' with the causal mixer 'delta_net'"):
        make("delta_net", pool="first")
    with pytest.raises(UnknownNameError, match="combine: expected one of"):
        make(combine="sum")
    assert isinstance(create_model("matching", vocab_size=5, dim=8, depth=1, max_length=4), MatchingEncoder)
