"""Spiking self-attention by its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer, record
from mixers.definition import assert_defined_by, build, tokens
from mixers.spiking_oracle import disturb, fire, layer

OPTIONS = [
    {"threshold": 0.5, "attention_threshold": 0.25, "scale": 0.25},
    {"num_steps": 3, "tau": 1.5, "threshold": 0.4, "attention_threshold": 0.3, "surrogate": "arctan", "alpha": 2.0},
]


@pytest.mark.tier("T2", "mixer:spiking")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=["sigmoid", "arctan"])
def test_spiking(options, train, masked) -> None:
    mixer = build("spiking", **options).train(train)
    disturb(mixer)
    x, real = tokens(), torch.ones(2, 9, dtype=torch.bool)
    if masked:
        real[0, 7:] = real[1, 0] = real[1, 4] = False
    neuron = {
        "tau": mixer.q_proj.neuron.tau,
        "surrogate": options.get("surrogate", "sigmoid"),
        "alpha": options.get("alpha", 4.0),
    }
    steps = options.get("num_steps", 4)

    def definition(x: Tensor) -> Tensor:
        shown = torch.stack([x * real[..., None]] * steps)
        q, k, v = (
            fire(layer(part, shown, real), options["threshold"], **neuron) for part in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        heads = []
        for part in range(3):
            own = slice(4 * part, 4 * part + 4)
            scores = torch.einsum("tbid,tbjd->tbij", q[..., own], k[..., own])
            heads.append(torch.einsum("tbij,tbjd->tbid", scores, v[..., own]) * mixer.scale)
        attended = fire(torch.cat(heads, -1), options["attention_threshold"], **neuron)
        spikes = fire(layer(mixer.out_proj, attended, real), options["threshold"], **neuron)
        return spikes.mean(0) * real[..., None]

    assert_defined_by(mixer, definition, x, mask=real if masked else None)
    rate = float(definition(x).mean().detach())
    assert 0.05 < rate < 0.95  # neither silent nor saturated


def test_spikes_of_several_steps_go_in_and_come_out() -> None:
    mixer = build("spiking", **OPTIONS[0]).eval()
    x, mask = (torch.rand(5, 2, 9, 12) < 0.3).double(), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    with record(mixer) as tape:
        y = mixer.spike(x, mask=mask)
    assert y.shape == x.shape
    assert set(y.unique().tolist()) == {0.0, 1.0}
    assert not y[:, 0, :3].any()
    assert not torch.equal(y[0], y[-1])
    poisoned = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    assert torch.equal(mixer.spike(poisoned, mask=mask), y)
    names = ("q_spikes", "k_spikes", "v_spikes", "attention_spikes", "output_spikes")
    rates = torch.stack([tape[name][:, mask].mean() for name in names])
    torch.testing.assert_close(tape["spike_rate"], rates)


def test_steps_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x: expected \(steps, batch, tokens, 12\)"):
        build("spiking").spike(torch.zeros(2, 1, 3, 11, dtype=torch.float64))


def test_every_call_begins_at_rest() -> None:
    mixer, x = build("spiking", **OPTIONS[0]).eval(), tokens()
    assert torch.equal(mixer(x), mixer(x))


def test_no_map_between_tokens_is_made() -> None:
    mixer, x = create_mixer("spiking", 16, 4, num_steps=2), torch.randn(1, 300, 16)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Sizes():
        mixer(x).sum().backward()
    assert max(sizes) < 300 * 300


def test_autocast_changes_no_spike() -> None:
    mixer, x = create_mixer("spiking", 16, 4, **OPTIONS[0]), torch.randn(2, 300, 16)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps: expected a positive number"),
        ({"scale": 0.0}, "scale: expected a positive number"),
        ({"tau": 0.5}, "tau: expected at least 1"),
        ({"threshold": 0.0}, "threshold: expected a positive number"),
        ({"attention_threshold": -1.0}, "attention_threshold: expected a positive number"),
        ({"surrogate": "step"}, "surrogate: expected one of"),
        ({"alpha": 0.0}, "alpha: expected a positive number"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("spiking", 12, 3, **options)
