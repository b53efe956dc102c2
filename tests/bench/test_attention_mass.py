"""The parts of ``scripts/bench/attention_mass.py``: what it trains on, what it measures, and what it keeps."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from attnlab.mixers.dense.softmax import SoftmaxAttention

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import attention_mass as script
import mass_sources as sources
from attention_mass import NotComparable, entropy, fill, known, layer, measure, mechanisms
from mass_sources import DIM, HEADS, SOURCES, TONES, Source

from attnlab.tasks.contract import IGNORE
from attnlab.tasks.corpus import load_corpus


def draw_steps(split: str, count: int, tokens: int, generator: torch.Generator) -> sources.Examples:
    """Ids that go up by one."""
    ids = (torch.randint(4, (count, 1), generator=generator) + torch.arange(tokens + 1)) % 4
    return ids[:, :-1], ids[:, 1:]


TINY = Source("the next of four", draw_steps, 4, 24, True, None, ((12, 8, 30), (24, 2, 5)), 0.01, 1.0)


def softmax_layer(n: int, causal: bool = False, grid: tuple[int, ...] | None = None) -> script.Layer:
    return layer(SoftmaxAttention(DIM, HEADS, causal=causal).eval(), 2 * torch.randn(1, n, DIM), grid)


def test_entropy_is_one_for_equal_weights_and_zero_for_one_key():
    equal = torch.ones(1, 2, 6, 6)
    assert entropy(equal / 6, False) == pytest.approx([1.0, 1.0])
    assert entropy(equal.tril() / torch.arange(1.0, 7.0)[:, None], True) == pytest.approx([1.0, 1.0])
    assert entropy(torch.eye(6).expand(1, 2, 6, 6), True) == pytest.approx([0.0, 0.0])


def test_the_mass_in_a_window_is_that_of_the_dense_weights_there():
    of = softmax_layer(300, causal=True)
    kept = measure("sliding_window", of)
    far = torch.arange(300)[:, None] - torch.arange(300)
    inside = (far >= 0) & (far < 256)
    assert kept.mass == pytest.approx(float((of.weights * inside).sum(-1).mean()), rel=1e-5)
    assert kept.pairs == pytest.approx(int(inside.sum()) / (300 * 301 / 2), rel=1e-6)
    assert not kept.same and kept.overlap == pytest.approx(kept.mass, rel=1e-5) and kept.mass < 1


def test_a_window_that_covers_all_tokens_is_dense_attention():
    kept = measure("sliding_window", softmax_layer(60, causal=True))
    assert kept.same and (kept.mass, kept.pairs, kept.overlap) == pytest.approx((1.0, 1.0, 1.0))


def test_summaries_reach_every_key_and_overlap_less():
    kept = measure("combiner", softmax_layer(256, causal=True))
    assert kept.pairs == pytest.approx(1.0) and not kept.same and kept.overlap < 0.99 * kept.mass


def test_biases_that_the_layer_has_not_are_taken_out():
    of = softmax_layer(64, grid=(8, 8))
    mixer = script.replacement("bi_level_routing", of)
    assert "q_proj.bias" in mixer.state_dict()
    for ours, theirs in zip(mixer.project(of.x)[:2], of.mixer.project(of.x)[:2], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "causal", "why"),
    [
        ("criss_cross", False, "no single map"),
        ("outlook", False, "other things than projected"),
        ("sage", False, "no single map"),
    ],
)
def test_what_cannot_take_the_place_says_why(name, causal, why):
    with pytest.raises(NotComparable, match=why):
        measure(name, softmax_layer(64, causal, None if name == "sage" else (8, 8)))


def test_mechanisms_take_the_shape_and_the_form():
    assert "quest" in mechanisms(SOURCES["text"]) and "quest" not in mechanisms(SOURCES["hidden_text"])
    assert "window" in mechanisms(SOURCES["photographs"]) and "window" not in mechanisms(SOURCES["text"])


def test_rows_are_kept_while_the_setup_is_the_same(monkeypatch):
    monkeypatch.setitem(SOURCES, "tiny", TINY)
    entry = known({}, "tiny")
    names = ["sliding_window", "quest"]
    assert len(list(fill(entry, TINY, 0, names))) == 2
    row = entry["seeds"]["0"]["mixers"]["quest"]
    assert 0 < row["trained"]["mass"] <= 1 and 0 < row["random"]["pairs"] <= 1
    assert entry["seeds"]["0"]["trained"]["bits"] < 1.0 < math.log2(4)
    monkeypatch.setattr(script, "train", None)  # a second run trains nothing
    assert list(fill(known({"tiny": entry}, "tiny"), TINY, 0, names)) == []
    assert known({"tiny": {**entry, "setup": {**entry["setup"], "rate": 1.0}}}, "tiny")["seeds"] == {}


def test_reasons_are_rows_too(monkeypatch):
    monkeypatch.setitem(SOURCES, "tiny", TINY)
    entry = known({}, "tiny")
    (line,) = fill(entry, TINY, 0, ["grassmann"])
    assert entry["seeds"]["0"]["mixers"]["grassmann"]["reason"] in line


def test_text_is_made_of_passages_that_come_again_near_and_far():
    text = bytes(load_corpus(4_000_000).splits["valid"].tolist())
    apart = []
    for row in sources.passages("valid", 8, 2048, torch.Generator().manual_seed(0)):
        parts = [bytes(part.tolist()) for part in row.split(sources.PASSAGE)]
        assert all(part in text for part in parts) and 8 < len(set(parts)) < 32
        apart += [place - parts[:place].index(part) for place, part in enumerate(parts) if part in parts[:place]]
    assert 1 in apart and max(apart) > 32


def test_hidden_places_alone_are_asked_for():
    ids = torch.randint(1, 9, (3, 400))
    given, targets = sources.hide(ids, 0.25, 0, torch.Generator().manual_seed(0))
    hidden = targets != IGNORE
    assert (targets[hidden] == ids[hidden]).all() and (given[hidden] == 0).all() and (given[~hidden] == ids[~hidden]).all()
    assert 0.2 < float(hidden.float().mean()) < 0.3


@pytest.mark.parametrize(("split", "tones"), [("train", {3}), ("valid", {7})])
def test_held_out_pixels_are_no_training_pixels(monkeypatch, split, tones):
    image = torch.full((30, 60), 3)
    image[:, 40:] = 7
    monkeypatch.setattr(sources, "photographs", lambda: (image, image))
    given, targets = sources.hidden_pixels(split, 8, 64, torch.Generator().manual_seed(0))
    assert given.shape == (8, 64) and set(given.unique().tolist()) == tones | {TONES}
    assert set(targets.unique().tolist()) == tones | {IGNORE}
