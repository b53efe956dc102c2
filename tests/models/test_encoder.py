from __future__ import annotations

import pytest
import torch

import attnlab
from attnlab.core.catalog import mixers
from attnlab.core.errors import UnsupportedError
from attnlab.models import EncoderClassifier
from attnlab.models.encoder import pool_tokens
from models.by_place import BY_PLACE

D = torch.float64
ALL = attnlab.list_mixers()


TURNED = ("mala", "rala")  # a pair of channels for each axis of a grid: heads of 2 are too narrow


def options_of(mixer):
    info = attnlab.mixer_info(mixer)
    wider = {"head_dim": 4} if mixer in TURNED else {}
    return wider | {name: value for name, value in info.example if name != info.supports.tokens_option}


def make(mixer="softmax", **options):
    common = {"mixer_options": options_of(mixer), "dtype": D}
    return EncoderClassifier(3, 8, 2, mixer, 4, **{**common, **options}).eval()


# as published, what they choose by is not learned through the output
NOT_LEARNED = {
    "union_of_experts": ("mixer.gate.",),
    "product_quantized": ("mixer.quantizer.",),
    "sparsifiner": ("mixer.predictor.",),
    "top_m_aggregation": ("mixer.probe",),
}


@pytest.mark.parametrize("mixer", ALL)
def test_every_mixer_fits_a_patch_grid(mixer):
    model = make(mixer, input="patches", patch_dim=4, grid=(4, 4))
    x = torch.randn(2, 16, 4, dtype=D)
    logits = model(x)
    logits.square().sum().backward()
    assert logits.shape == (2, 3)
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(any(part in name for part in NOT_LEARNED.get(mixer, ())) for name in still), still
    assert model.blocks[0].mixer.causal == (attnlab.mixer_info(mixer).supports.causal == "always")


@pytest.mark.parametrize("mixer", attnlab.list_mixers(grid=1, mask=True, tokens_option=None))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_padded_batch_equals_the_unpadded(mixer, side, pool):
    if side == "left" and mixer in BY_PLACE:
        assert "pad on the right" in " ".join((mixers.get(mixer).factory.__doc__ or "").split())
        return
    # focal modulation's kernels lie on a grid or a line; sinks are the first tokens in place, real or not
    more = {"focal_modulation": {"rank": 1}, "sliding_window": {"num_sinks": 0}}.get(mixer, {})
    model = make(mixer, vocab_size=11, max_length=12, pool=pool, mixer_options={**options_of(mixer), **more})
    ids, padding = torch.randint(11, (2, 9)), torch.randint(11, (2, 3))
    order = slice(None, None, -1) if side == "left" else slice(None)
    mask = torch.cat((torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool))[order], 1)
    padded = torch.cat((ids, padding)[order], 1)
    torch.testing.assert_close(model(padded, mask=mask), model(ids), rtol=1e-8, atol=1e-10)


def test_masked_patches_have_no_influence():
    model = make(input="patches", patch_dim=4, grid=(3, 4), norm="group_norm")
    x = torch.randn(2, 12, 4, dtype=D)
    mask = torch.rand(2, 12) > 0.4
    poisoned = x.masked_fill(~mask[..., None], float("nan"))
    assert torch.equal(model(poisoned, mask=mask), model(x, mask=mask))


def test_pooling_reads_real_tokens():
    x = torch.randn(3, 4, 2)
    mask = torch.tensor([[False, True, True, False], [True, True, True, True], [False] * 4])
    mean, first, last = (pool_tokens(x, mask, pool) for pool in ("mean", "first", "last"))
    torch.testing.assert_close(mean, torch.stack((x[0, 1:3].mean(0), x[1].mean(0), torch.zeros(2))))
    assert torch.equal(first, torch.stack((x[0, 1], x[1, 0], torch.zeros(2))))
    assert torch.equal(last, torch.stack((x[0, 2], x[1, 3], torch.zeros(2))))
    assert torch.equal(pool_tokens(x, None, "last"), x[:, -1])


def test_refusals():
    with pytest.raises(ValueError, match="pool: expected 'mean' or 'last' with the causal mixer 'delta_net'"):
        make("delta_net", vocab_size=5, max_length=8, pool="first")
    with pytest.raises(ValueError, match=r"input='patches': expected patch_dim and no vocab_size, got patch_dim=None"):
        make(input="patches", vocab_size=5)
    with pytest.raises(UnsupportedError, match="group_norm"):
        make("mamba", vocab_size=5, max_length=8, norm="group_norm")
    with pytest.raises(ValueError, match="grid: expected positive sides with product 10"):
        make(vocab_size=5, grid=(3, 3), position="none")(torch.zeros(1, 10, dtype=torch.int64))
