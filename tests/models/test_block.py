from __future__ import annotations

import pytest
import torch
from torch import nn

import attnlab
from attnlab.channel_mixers import ChannelMixer, create_channel_mixer
from attnlab.core.errors import UnknownNameError, UnsupportedError
from attnlab.core.tokens import Tokens
from attnlab.models import Block, Residual

D = torch.float64


class Reader(ChannelMixer):
    per_token = False

    def forward(self, x, *, mask=None, grid=None):
        return x.cumsum(1)


class Halve(nn.Module):
    def forward(self, tokens):
        return Tokens(tokens.x[:, ::2], None if tokens.mask is None else tokens.mask[:, ::2])


class Gate(nn.Module):
    def forward(self, stream, branch):
        return branch * stream.sigmoid()


def make(mixer="softmax", causal=True, channel="mlp", **options):
    part = attnlab.create_mixer(mixer, 8, 2, causal=causal, dtype=D)
    channels = None if channel is None else create_channel_mixer(channel, 8, dtype=D)
    block = Block(8, part, channels, dtype=D, **options)
    for parameter in block.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return block


def layer(norm, x):
    return nn.functional.layer_norm(x, (8,), norm.weight, norm.bias, 1e-5)


def test_the_placements_are_their_equations():
    x = torch.randn(2, 5, 8, dtype=D)
    block = make(placement="pre")
    y = x + block.mixer(layer(block.mixer_norm, x))
    y = y + block.channel_mixer(layer(block.channel_norm, y))
    torch.testing.assert_close(block(Tokens(x)).x, y, rtol=1e-12, atol=1e-12)

    block = make(placement="post")
    y = layer(block.mixer_norm, x + block.mixer(x))
    y = layer(block.channel_norm, y + block.channel_mixer(y))
    torch.testing.assert_close(block(Tokens(x)).x, y, rtol=1e-12, atol=1e-12)

    block = make(placement="sandwich")
    y = x + layer(block.mixer_post_norm, block.mixer(layer(block.mixer_norm, x)))
    y = y + layer(block.channel_post_norm, block.channel_mixer(layer(block.channel_norm, y)))
    torch.testing.assert_close(block(Tokens(x)).x, y, rtol=1e-12, atol=1e-12)

    block = make(placement="pre", parallel=True)
    h = layer(block.mixer_norm, x)
    torch.testing.assert_close(block(Tokens(x)).x, x + block.mixer(h) + block.channel_mixer(h), rtol=1e-12, atol=1e-12)


def test_layer_scale_and_gates_act_on_the_branches():
    x = torch.randn(2, 5, 8, dtype=D)
    block = make(layer_scale=0.5, gates=(Gate(), None))
    h = x + block.mixer_residual.scale * (block.mixer(layer(block.mixer_norm, x)) * x.sigmoid())
    y = h + block.channel_residual.scale * block.channel_mixer(layer(block.channel_norm, h))
    torch.testing.assert_close(block(Tokens(x)).x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("norm", ["layer_norm", "group_norm", "none"])
def test_padding_leaks_nowhere_and_stays_zero(placement, parallel, norm):
    block = make(causal=False, norm=norm, placement=placement, parallel=parallel)
    short = torch.randn(2, 4, 8, dtype=D)
    mask = torch.tensor([False, True, True, False, True, True])
    padded = torch.full((2, 6, 8), float("nan"), dtype=D)
    padded[:, mask] = short
    y = block(Tokens(padded, mask.expand(2, -1))).x
    torch.testing.assert_close(y[:, mask], block(Tokens(short)).x, rtol=1e-10, atol=1e-12)
    assert y[:, ~mask].abs().sum() == 0


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("parallel", [False, True])
def test_pieces_equal_the_whole(placement, parallel):
    block = make(placement=placement, parallel=parallel)
    x = torch.randn(3, 7, 8, dtype=D)
    state, pieces = block.init_state(3), []
    for piece in x.split((2, 1, 4), dim=1):
        y, state = block.extend(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), block(Tokens(x)).x, rtol=1e-10, atol=1e-12)


def test_a_grid_goes_to_mixers_that_take_it_and_the_raster_to_others():
    x = torch.randn(1, 6, 8, dtype=D)
    seen = []
    for name, causal in (("softmax", False), ("delta_net", True)):
        block = make(name, causal)
        block.mixer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["grid"]), with_kwargs=True)
        block(Tokens(x, grid=(2, 3)))
        block(Tokens(torch.cat((x, x[:, :1]), 1), grid=(2, 3), num_prefix=1))
    assert seen == [(2, 3), None, None, None]


def test_what_stands_between_may_reduce_the_tokens():
    block = make(between=Halve())
    assert block(Tokens(torch.randn(2, 6, 8, dtype=D))).x.shape == (2, 3, 8)
    assert not block.streams
    with pytest.raises(UnsupportedError, match="streaming in this block"):
        block.init_state(2)


def test_stochastic_depth_drops_whole_branches_of_examples_by_the_given_generator():
    residual = Residual(3, drop_path=0.25, generator=torch.Generator().manual_seed(5))
    x, f = torch.zeros(4000, 2, 3), torch.ones(4000, 2, 3)
    kept = residual(x, f)
    assert set(kept.flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(kept.amin((1, 2)), kept.amax((1, 2)))
    share = (kept[:, 0, 0] > 0).float().mean().item()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5
    residual.generator.manual_seed(5)
    assert torch.equal(residual(x, f), kept)
    assert torch.equal(residual.eval()(x, f), f)


def test_refusals():
    with pytest.raises(UnsupportedError, match="group_norm"):
        make(norm="group_norm")
    with pytest.raises(UnknownNameError, match="placement"):
        make(placement="Pre")
    with pytest.raises(ValueError, match="parallel: expected a channel mixer"):
        make(channel=None, parallel=True)
    with pytest.raises(ValueError, match="mixer: expected width 16"):
        Block(16, attnlab.create_mixer("softmax", 8, 2))
    with pytest.raises(UnsupportedError, match="a causal block"):
        Block(8, attnlab.create_mixer("softmax", 8, 2, causal=True), Reader(8, 8))
    with pytest.raises(ValueError, match="drop_path"):
        make(drop_path=1.0)
