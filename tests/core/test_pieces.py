"""`forward` in pieces through a bounded state, where nobody differentiates, is `forward` at once."""

from __future__ import annotations

import pytest
import torch

from attnlab import create_mixer, list_mixers, mixer_info
from attnlab.core.streaming import StreamingMixer

BOUNDED = [name for name in list_mixers(streaming=True) if mixer_info(name).supports.state == "bounded"]


def built(name: str) -> StreamingMixer:
    torch.manual_seed(0)
    info = mixer_info(name)
    options = {**dict(info.example), **({} if info.supports.causal == "no" else {"causal": True})}
    return create_mixer(name, 16, 4, **options).double().eval()


def lengths_taken(mixer: StreamingMixer, monkeypatch) -> list[int]:
    """How many tokens each call of `advance` gets from here on."""
    taken: list[int] = []
    advance = type(mixer).advance

    def counted(self, x, state, *, mask):
        taken.append(x.shape[1])
        return advance(self, x, state, mask=mask)

    monkeypatch.setattr(type(mixer), "advance", counted)
    return taken


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("masked", [False, True])
def test_pieces_equal_the_whole(name, masked, monkeypatch) -> None:
    mixer = built(name)
    if not mixer.supports.streaming:
        pytest.fail(f"{name}'s example takes the promise of streaming back")
    x = torch.randn(2, 45, 16, dtype=torch.float64)
    mask = torch.rand(2, 45) > 0.3 if masked else None
    whole = mixer(x, mask=mask).detach()
    taken = lengths_taken(mixer, monkeypatch)
    monkeypatch.setattr(type(mixer), "piece", 40)
    with torch.no_grad():
        pieces = mixer(x, mask=mask)
    assert taken == [20, 20, 5]
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)


def test_a_differentiated_or_training_mixer_reads_at_once(monkeypatch) -> None:
    mixer = built("lightning")
    taken = lengths_taken(mixer, monkeypatch)
    monkeypatch.setattr(type(mixer), "piece", 4)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    assert mixer(x).requires_grad
    with torch.no_grad():
        mixer.train()(x)
    assert taken == [9, 9]


def test_pieces_have_the_dtype_of_the_whole_under_autocast(monkeypatch) -> None:
    mixer = built("lightning").float()
    x = torch.randn(1, 9, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole = mixer(x)
        monkeypatch.setattr(type(mixer), "piece", 4)
        pieces = mixer(x)
    assert pieces.dtype == whole.dtype == torch.bfloat16
