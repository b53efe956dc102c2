"""The extractors by the card's equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnlab
from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens

PARAMETERS = {"she": 20 * 144 + 144, "he": 2 * 144 + 20 * 12, "we": 144 + 20 * 12, "me": 20 * 12}


@pytest.mark.tier("T2", "mixer:extractor")
@pytest.mark.parametrize("scale", ["inverse_sqrt", "none"])
@pytest.mark.parametrize("index", ["absolute", "distance"])
@pytest.mark.parametrize("kind", list(PARAMETERS))
def test_extractor(kind, index, scale) -> None:
    mixer = build("extractor", kind=kind, index=index, scale=scale, max_length=20)

    def definition(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                extracted = torch.zeros_like(x[b, t])
                for i in range(t + 1):
                    weight = mixer.weight[i if index == "absolute" else t - i]
                    value = x[b, i] @ mixer.v_proj.weight.T if kind == "he" else x[b, i]
                    extracted = extracted + (value @ weight if kind == "she" else value * weight)
                if scale == "inverse_sqrt":
                    extracted = extracted / (t + 1) ** 0.5
                adjusted = x[b, t] if kind == "me" else x[b, t] @ mixer.adjust_proj.weight.T
                out[b, t] = adjusted * extracted
        return out

    assert_defined_by(mixer, definition, tokens())
    assert sum(parameter.numel() for parameter in mixer.parameters()) == PARAMETERS[kind]


@pytest.mark.parametrize("index", ["absolute", "distance"])
@pytest.mark.parametrize("kind", list(PARAMETERS))
def test_every_kind_keeps_the_laws(kind, index) -> None:
    some = ("padding_*", "empty_*", "causality_*", "streaming_*", "batch_*", "precision_*", "meta_device")
    report = attnlab.check("extractor", only=some, options={"kind": kind, "index": index, "max_length": 256})
    assert report.passed, str(report)


@pytest.mark.parametrize("index", ["absolute", "distance"])
@pytest.mark.parametrize("kind", ["she", "we"])
def test_padding_does_not_move_positions(kind, index) -> None:
    mixer, x = build("extractor", kind=kind, index=index, max_length=8), tokens(11)
    real = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    torch.testing.assert_close(mixer(x, mask=real.expand(2, -1))[:, real], mixer(x[:, real]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("index", ["absolute", "distance"])
@pytest.mark.parametrize("max_length", [7, 40])
def test_examples_stream_each_from_its_own_position(index, max_length) -> None:
    mixer, x = build("extractor", index=index, max_length=max_length), tokens(9)
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 1, 0, 1, 1]], dtype=torch.bool)
    state, outputs = mixer.init_state(2), []
    for part in ([0, 1, 2, 3, 4], [5], [6, 7, 8]):
        y, state = mixer.extend(x[:, part], state, mask=mask[:, part])
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x, mask=mask), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("index", ["absolute", "distance"])
def test_nothing_is_defined_beyond_max_length(index) -> None:
    mixer, x = build("extractor", index=index, max_length=6), tokens(7)
    mask = torch.ones(2, 7, dtype=torch.bool)
    for real in (None, mask):
        with pytest.raises(ValueError, match=r"at most max_length=6 real tokens in all, got 7"):
            mixer(x, mask=real)
    mask[:, 2] = False
    y, state = mixer.extend(x, mixer.init_state(2), mask=mask)
    torch.testing.assert_close(y, mixer(x, mask=mask), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="got 7"):
        mixer.extend(x[:, :1], state)


def test_no_weight_is_copied_a_token() -> None:
    mixer = create_mixer("extractor", 16, max_length=64)
    x, mask = torch.randn(8, 64, 16), torch.rand(8, 64) > 0.2
    largest = mixer.weight.numel()
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    with torch.no_grad(), Sizes():
        _, state = mixer.extend(x[:, :32], mixer.init_state(8), mask=mask[:, :32])
        mixer.extend(x[:, 32:33], state)
        mixer(x, mask=mask)
    assert max(sizes) <= largest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ne"}, "kind: expected"),
        ({"index": "relative"}, "index: expected"),
        ({"scale": "sqrt"}, "scale: expected"),
        ({"max_length": 0}, "max_length: expected"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("extractor", 12, **options)
