from __future__ import annotations

import pytest
import torch
from torch import nn

from attnlab.models import CausalLM, create_model
from attnlab.models.segment_recurrence import SegmentRecurrence

D = torch.float64


def language_model(mixer="softmax", depth=2, **options) -> CausalLM:
    torch.manual_seed(2)
    given = {"short_conv": 3, "position": "sinusoidal", "dtype": D}
    return CausalLM(11, 8, depth, mixer, 2, **(given | options)).eval()


def ids(batch=2, n=13) -> torch.Tensor:
    return torch.randint(11, (batch, n))


@pytest.mark.parametrize("segment", [1, 4, 5, 64])
@pytest.mark.parametrize("options", [{}, {"mixer_options": {"position": "rotary"}, "position": "none"}], ids=str)
def test_with_memory_for_all_it_is_the_model_itself(segment, options):
    model, tokens = language_model(**options), ids()
    torch.testing.assert_close(SegmentRecurrence(model, segment, 64)(tokens), model(tokens), rtol=1e-9, atol=1e-11)


def test_equals_the_definition_for_a_short_memory():
    model, tokens = language_model(short_conv=0, position="none"), ids(1)
    memory = [torch.zeros(1, 0, 8, dtype=D) for _ in model.blocks]
    expected = []
    for piece in tokens.split(4, 1):
        x = model.embedding(piece)
        for layer, block in enumerate(model.blocks):
            both = torch.cat((memory[layer], x), 1)
            rows = []
            for i in range(x.shape[1]):  # each token with all before it, and no other
                seen = both[:, : memory[layer].shape[1] + i + 1]
                h = block.mixer_norm(seen, None)
                y = seen[:, -1] + block.mixer(h)[:, -1]
                rows.append(y + block.channel_mixer(block.channel_norm(y[:, None], None))[:, 0])
            memory[layer] = both[:, -3:].detach()
            x = torch.stack(rows, 1)
        expected.append(model.norm(x, None) @ model.embedding.weight.T)
    torch.testing.assert_close(SegmentRecurrence(model, 4, 3)(tokens), torch.cat(expected, 1), rtol=1e-9, atol=1e-11)


def test_it_reaches_back_by_its_memory_in_every_layer_and_not_by_gradients():
    model = language_model(short_conv=0)
    wrapped, tokens = SegmentRecurrence(model, 4, 4), ids(1)
    first, late = wrapped(tokens), tokens.clone()
    late[0, 3] = (late[0, 3] + 1) % 11
    changed = (wrapped(late) - first).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False] * 3 + [True] * 9 + [False]  # 4 tokens a layer before the segment, and two layers
    x = model.embedding(tokens).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: x)
    (gradient,) = torch.autograd.grad(wrapped(tokens)[0, 9].sum(), x)
    assert (gradient[0, 8:10].abs().amax(-1) > 0).all()
    assert float(gradient[0, :8].abs().sum()) == 0.0 and float(gradient[0, 10:].abs().sum()) == 0.0


@pytest.mark.parametrize("mixer", ["softmax", "delta_net"])
def test_pieces_of_whole_segments_equal_the_whole_and_the_state_is_bounded(mixer):
    model = SegmentRecurrence(language_model(mixer), 4, 6)
    tokens, state, outputs, sizes = ids(2, 28), model.init_state(2), [], []
    for piece in tokens.split(8, 1):
        y, state = model.extend(piece, state)
        outputs.append(y)
        sizes.append(state.nbytes)
    torch.testing.assert_close(torch.cat(outputs, 1), model(tokens), rtol=1e-9, atol=1e-11)
    assert len(set(sizes[1:])) == 1


def test_masked_tokens_are_as_if_they_were_not_there():
    model, tokens = SegmentRecurrence(language_model(), 4, 6), ids(2, 15)
    mask = torch.rand(2, 15, generator=torch.Generator().manual_seed(1)) < 0.6
    y = model(tokens, mask=mask)
    for b in range(2):
        torch.testing.assert_close(y[b, mask[b]], model(tokens[b : b + 1, mask[b]])[0], rtol=1e-8, atol=1e-10)


def test_padding_that_comes_in_one_piece_only_is_no_past_for_the_next():
    model, tokens = SegmentRecurrence(language_model(), 4, 6), ids(2, 16)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 4:] = False
    _, state = model.extend(tokens[:, :8], model.init_state(2), mask=mask)
    y, _ = model.extend(tokens[:, 8:], state)
    alone = model(torch.cat((tokens[:1, :4], tokens[:1, 8:]), 1))
    torch.testing.assert_close(y[:1], alone[:, 4:], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(y[1:], model(tokens[1:])[:, 8:], rtol=1e-8, atol=1e-10)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="model: expected a CausalLM"):
        create_model("segment_recurrence", model=nn.Identity())
    with pytest.raises(ValueError, match="segment: expected at least 1"):
        create_model("segment_recurrence", model=language_model(), segment=0)
    with pytest.raises(ValueError, match="learned positions"):
        SegmentRecurrence(language_model(position="learned", max_length=9))
