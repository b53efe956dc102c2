from __future__ import annotations

import pytest
import torch

import attnlab
from attnlab.checking.causality import LEAK
from attnlab.core.catalog import mixers
from attnlab.core.errors import UnknownNameError, UnsupportedError
from attnlab.models import CausalLM, create_model, list_models, model_info
from attnlab.models.embedding import sinusoids
from models.by_place import BY_PLACE

D = torch.float64
CAUSAL = attnlab.list_mixers(causal=True, grid=1)
STREAMING = attnlab.list_mixers(causal=True, streaming=True)


def make(mixer="softmax", **options):
    example = dict(attnlab.mixer_info(mixer).example) if isinstance(mixer, str) else None
    common = {"short_conv": 3, "position": "learned", "max_length": 12, "mixer_options": example, "dtype": D}
    return CausalLM(11, 8, 2, mixer, 4, **{**common, **options}).eval()


def tokens(batch=2, n=9):
    return torch.randint(11, (batch, n))


def test_it_is_registered():
    assert "causal_lm" in list_models()
    assert {"vocab_size", "mixer", "tie_embeddings"} <= {option.name for option in model_info("causal_lm").options}
    assert isinstance(create_model("causal_lm", vocab_size=5, dim=4, depth=1, num_heads=2), CausalLM)


@pytest.mark.parametrize("mixer", CAUSAL)
def test_no_logit_depends_on_a_later_token(mixer):
    model, ids = make(mixer), tokens(1)
    x = model.embedding(ids).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: x)
    for t in range(ids.shape[1]):
        (gradient,) = torch.autograd.grad(model(ids)[0, t].square().sum(), x)
        moved = gradient[0].abs().amax(dim=-1)
        assert moved[t + 1 :].sum() <= LEAK * moved.max() and moved[t] > 0


@pytest.mark.parametrize("mixer", STREAMING)
@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal"])
def test_pieces_equal_the_whole(mixer, position):
    model, ids = make(mixer, position=position), tokens()
    state, logits = model.init_state(2), []
    for piece in ids.split((3, 1, 5), dim=1):
        y, state = model.extend(piece, state)
        logits.append(y)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mixer", CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_the_unpadded(mixer, side):
    if side == "left" and mixer in BY_PLACE:
        assert "pad on the right" in " ".join((mixers.get(mixer).factory.__doc__ or "").split())
        return
    # attention sinks are the first tokens in place, real or not: with padding before them there are none
    sinkless = {"mixer_options": {"window": 4, "num_sinks": 0}} if mixer == "sliding_window" else {}
    model, ids = make(mixer, **sinkless), tokens()
    padding, pad = tokens(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    order = slice(None, None, -1) if side == "left" else slice(None)
    padded = torch.cat((ids, padding)[order], 1)
    mask = torch.cat((torch.ones(2, 9, dtype=torch.bool), pad)[order], 1)
    torch.testing.assert_close(model(padded, mask=mask)[mask], model(ids).flatten(0, 1), rtol=1e-8, atol=1e-10)


def test_a_padded_prefix_streams_like_the_whole():
    model, ids = make("delta_net"), tokens()
    mask = torch.tensor([[False, False, True] + [True] * 6, [True] * 9])
    state, logits = model.init_state(2), []
    for piece in (slice(0, 4), slice(4, 9)):
        y, state = model.extend(ids[:, piece], state, mask=mask[:, piece])
        logits.append(y)
    torch.testing.assert_close(torch.cat(logits, 1)[mask], model(ids, mask=mask)[mask], rtol=1e-8, atol=1e-10)


def test_a_state_can_be_saved_and_reordered(tmp_path):
    model, ids = make("softmax"), tokens()
    _, state = model.extend(ids[:, :5], model.init_state(2))
    state.save(tmp_path / "state.safetensors")
    turned = attnlab.State.load(tmp_path / "state.safetensors").select(torch.tensor([1, 0]))
    y, _ = model.extend(ids[:, 5:].flip(0), turned)
    torch.testing.assert_close(y, model(ids)[:, 5:].flip(0), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_generation_with_a_state_equals_running_again(placement, monkeypatch):
    model, prompt = make("softmax", max_length=20, placement=placement), tokens(3, 4)
    greedy = model.generate(prompt, 6, temperature=0.0)
    drawn = model.generate(prompt, 6, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(CausalLM, "streams", False)
    assert torch.equal(model.generate(prompt, 6, temperature=0.0), greedy)
    assert torch.equal(model.generate(prompt, 6, generator=torch.Generator().manual_seed(3)), drawn)
    assert torch.equal(greedy[:, :4], prompt) and greedy.shape == (3, 10)
    assert torch.equal(greedy[:, 4:], model(greedy)[:, 3:-1].argmax(-1))


def test_generation_leaves_the_mode_as_it_was():
    model = make(drop_path=0.5).train()
    model.blocks[0].eval()
    model.generate(tokens(), 2)
    assert model.training and model.blocks[1].training and not model.blocks[0].training


def test_layers_can_alternate():
    model = make(["softmax", "delta_net"], mixer_options=[{"position": "rotary"}, {"conv_size": 2}])
    assert [block.mixer.info.name for block in model.blocks] == ["softmax", "delta_net"]
    model = CausalLM(11, 8, 3, ["softmax", "mamba"], 2)
    assert [block.mixer.info.name for block in model.blocks] == ["softmax", "mamba", "softmax"]
    with pytest.raises(ValueError, match="mixer_options: expected one mapping, or 2"):
        make(["softmax", "delta_net"], mixer_options=[{}])


def test_a_layer_that_decays_by_depth_knows_where_it_stands():
    first, last = (block.mixer for block in CausalLM(11, 8, 2, "lightning", 2).blocks)
    assert any(not torch.equal(a, b) for a, b in zip(first.buffers(), last.buffers(), strict=True))


def test_sinusoids_are_their_formula():
    table = sinusoids(torch.arange(5)[None], 6, D)[0]
    for p in range(5):
        for i in range(3):
            angle = torch.tensor(p / 10000 ** (2 * i / 6))
            torch.testing.assert_close(table[p, [i, 3 + i]], torch.stack((angle.sin(), angle.cos())).to(D))
    assert sinusoids(torch.arange(5)[None], 7, D).shape == (1, 5, 7)


def test_tied_and_untied_heads():
    tied, untied = make(), make(tie_embeddings=False)
    ids, seen = tokens(), []
    tied.norm.register_forward_hook(lambda *parts: seen.append(parts[2]))
    assert torch.equal(tied(ids), seen[0] @ tied.embedding.weight.T)
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 11 * 8


def test_refusals():
    with pytest.raises(UnsupportedError, match=r"'pooling' does not support a causal language model.*Mechanisms that do: \w+"):
        make("pooling")
    with pytest.raises(UnsupportedError, match="group_norm"):
        make(norm="group_norm")
    with pytest.raises(UnknownNameError, match="position"):
        make(position="learnt")
    with pytest.raises(ValueError, match="expected at most max_length=12"):
        make()(tokens(1, 13))
    with pytest.raises(ValueError, match="max_length"):
        make(max_length=None)
    with pytest.raises(ValueError, match="prompt"):
        make().generate(tokens(1, 0), 1)
    model = make()
    _, state = model.extend(tokens(2, 12), model.init_state(2))
    with pytest.raises(ValueError, match="expected at most max_length=12"):
        model.extend(tokens(2, 1), state)
