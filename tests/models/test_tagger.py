from __future__ import annotations

import pytest
import torch

import attnlab
from attnlab.core.catalog import mixers
from attnlab.core.errors import UnsupportedError
from attnlab.models import create_model
from attnlab.models.cross_block import queries_stand_alone
from models.by_place import BY_PLACE

D = torch.float64
SEQUENCES = attnlab.list_mixers(grid=1)
CROSS = attnlab.list_mixers(cross=True)
CAUSAL = [name for name in SEQUENCES if attnlab.mixer_info(name).supports.causal != "no"]
IN_DECODERS = [name for name in CROSS if queries_stand_alone(name)]


def make(mixer="softmax", context=False, **options):
    info = attnlab.mixer_info(mixer)
    own = {name: value for name, value in info.example if name != info.supports.tokens_option}
    second = {"context_dim": 5, "context_max_length": 16} if context else {}
    common = {"mixer_options": own, "vocab_size": 7, "max_length": 12, "dtype": D, **second}
    return create_model("tagger", num_outputs=3, dim=16, depth=2, mixer=mixer, num_heads=4, **{**common, **options}).eval()


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("mixer", SEQUENCES)
def test_every_mixer_of_sequences_fits(mixer):
    model = make(mixer)
    logits = model(torch.randint(7, (2, 12)))
    assert logits.shape == (2, 12, 3) and torch.isfinite(logits).all()
    assert len(model.blocks) == 2 and model.blocks[0].mixer.info.name == mixer


@pytest.mark.parametrize("mixer", CROSS)
def test_every_cross_mixer_reads_a_context(mixer):
    model = make(mixer, context=True)
    ids, context = torch.randint(7, (2, 9)), torch.randn(2, 14, 5, dtype=D, requires_grad=True)
    logits = model(ids, context=context)
    logits.square().sum().backward()
    assert logits.shape == (2, 9, 3) and len(model.blocks) == 2
    assert (context.grad.abs().sum(-1) > 0).all()
    assert mixer != "softmax" or all(parameter.grad is not None for parameter in model.parameters())


def test_the_mixers_whose_queries_look_at_one_another():
    assert set(CROSS) - set(IN_DECODERS) == {"agent", "flow", "hyper_attention", "reversed"}


@pytest.mark.parametrize("context", [False, True])
def test_causal_outputs_have_no_gradient_to_later_inputs(context):
    for mixer in IN_DECODERS if context else ("softmax", "delta_net", "mamba", "sliding_window"):
        model = make(mixer, context, causal=True, vocab_size=None, input_dim=4, short_conv=3)
        x = torch.randn(2, 8, 4, dtype=D, requires_grad=True)
        logits = model(x, context=torch.randn(2, 10, 5, dtype=D) if context else None)
        for place in range(8):
            (slope,) = torch.autograd.grad(logits[:, place].sum(), x, retain_graph=True)
            assert (slope[:, place] != 0).any() and (slope[:, place + 1 :] == 0).all(), mixer


def test_without_causal_the_whole_is_seen():
    model = make("softmax", vocab_size=None, input_dim=4)
    x = torch.randn(1, 8, 4, dtype=D, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    assert (slope != 0).any(-1).all()


def padded(real, extra, side):
    parts = [real, extra] if side == "right" else [extra, real]
    ones = [torch.ones(part.shape[:2], dtype=torch.bool) * (part is real) for part in parts]
    return torch.cat(parts, 1), torch.cat(ones, 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_of_inputs_changes_nothing(side, causal):
    for mixer in ("softmax", "linear", "delta_net", "sliding_window"):
        if side == "left" and mixer in BY_PLACE:
            continue
        own = {"num_sinks": 0} if mixer == "sliding_window" else {}
        model = make(mixer, causal=causal, short_conv=2, position="learned", mixer_options=own)
        real = torch.randint(7, (2, 8))
        ids, mask = padded(real, torch.randint(7, (2, 4)), side)
        torch.testing.assert_close(model(ids, mask=mask)[mask].view(2, 8, 3), model(real), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mixer", attnlab.list_mixers(cross=True, mask=True))
def test_padding_of_inputs_and_context_changes_nothing(mixer, side):
    if side == "left" and mixer in BY_PLACE:
        assert "pad on the right" in " ".join((mixers.get(mixer).factory.__doc__ or "").split())
        return
    model = make(mixer, context=True, causal=mixer in IN_DECODERS)
    real, read = torch.randint(7, (2, 8)), torch.randn(2, 9, 5, dtype=D)
    ids, mask = padded(real, torch.randint(7, (2, 4)), side)
    context, context_mask = padded(read, torch.full((2, 3, 5), float("nan"), dtype=D), side)
    found = model(ids, mask=mask, context=context, context_mask=context_mask)[mask].view(2, 8, 3)
    torch.testing.assert_close(found, model(real, context=read), rtol=1e-8, atol=1e-10)


def test_refusals_name_what_can():
    with pytest.raises(UnsupportedError, match=r"'delta_net' does not support a second sequence to read.*linear"):
        make("delta_net", context=True)
    with pytest.raises(UnsupportedError, match=r"'flow' does not support causal queries of a second sequence.*linear"):
        make("flow", context=True, causal=True)
    with pytest.raises(UnsupportedError, match="'pooling' does not support a causal"):
        make("pooling", causal=True)
    with pytest.raises(UnsupportedError, match="group_norm"):
        make(context=True, causal=True, norm="group_norm")
    with pytest.raises(ValueError, match="inputs: expected a vocab_size or a width of vectors, got 7 and 4"):
        make(input_dim=4)
    with pytest.raises(ValueError, match="context: expected a second sequence"):
        make(context=True)(torch.randint(7, (2, 8)))
    with pytest.raises(ValueError, match="context: expected None"):
        make()(torch.randint(7, (2, 8)), context=torch.randn(2, 8, 5, dtype=D))
    with pytest.raises(TypeError, match=r"inputs: expected integer ids \(batch, n\), got torch.float64"):
        make()(torch.randn(2, 8, 5, dtype=D))


def test_the_context_has_an_encoder_of_its_own_depth():
    none, two = make(context=True, context_depth=0), make(context=True)
    assert len(none.context_blocks) == 0 and len(two.context_blocks) == 2 and len(two.self_blocks) == 2
    assert numbers(none) < numbers(two)
