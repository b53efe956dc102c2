"""Gate, timing, memory, counts and the control's verdict, on what is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attnlab.compare.control import judge
from attnlab.compare.cost import layer_flops, state_bytes
from attnlab.compare.gate import Agreement, agreement, gate
from attnlab.compare.layers import Layer, build_layer, can_stream, random_input
from attnlab.compare.machine import machine_facts
from attnlab.compare.memory import peak_bytes
from attnlab.compare.timing import clock_of, layer_call, median_interval, time_pairs
from attnlab.ops.attention import ATTENTION, eager

SMALL = Layer("softmax", True, 16, 2)


def test_the_gate_passes_a_right_layer():
    found = gate(Layer("delta_net", True, 16, 2), tokens=70)
    assert found.passed, found
    assert 0 < found.outputs32 < 1e-5 and 0 < found.gradients64 < 1e-10


@pytest.mark.parametrize("slip", [1e-6, 1e-3])
def test_the_gate_catches_a_wrong_scale(monkeypatch, slip):
    def wrong(q, k, v, *, scale, **rest):
        return eager.attention(q, k, v, scale=scale * (1 + slip), **rest)

    monkeypatch.setitem(ATTENTION.implementations, "eager", wrong)
    found = gate(SMALL, tokens=20)
    assert not found.passed and found.outputs64 > 1e-9
    assert found.record()["passed"] is False


def test_the_gate_of_a_layer_that_raises_fails(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setitem(ATTENTION.implementations, "eager", broken)
    assert gate(SMALL, tokens=20).error == "RuntimeError: no"


def test_agreement_judges_float32_by_the_plain_formula():
    assert Agreement(outputs32=3e-5, plain_outputs32=1e-5).passed
    assert not Agreement(outputs32=5e-5, plain_outputs32=1e-5).passed
    assert not Agreement(gradients64=2e-8).passed
    assert not Agreement(outputs64=math.nan).passed

    def run(dtype):
        x = torch.linspace(0, 1, 50, dtype=dtype)
        return x.exp(), x.sin()

    assert agreement(run).passed


def test_pairs_are_interleaved_and_their_ratio_is_free_of_drift():
    now, slow, order = 0.0, 1.0, []

    def clock():
        return now

    def step(name, seconds):
        def call():
            nonlocal now, slow
            order.append(name)
            now += seconds * slow
            slow *= 1.05  # the machine gets slower all the time

        return call

    found = time_pairs(step("a", 0.3), step("b", 0.1), seconds=0.0, pairs=6, clock=clock)
    assert found.pairs == 6
    assert order[4:8] == ["a", "b", "b", "a"], "after the warm-up, who goes first alternates"
    assert found.ratio == pytest.approx(3.0, rel=0.06)
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert found.ratio_from <= found.ratio_low and found.ratio_high <= found.ratio_to, "six pairs: their whole range"


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    chance = np.random.default_rng(0)
    for count in (9, 15, 40):
        covered = 0
        for _ in range(1000):
            low, high = median_interval(list(chance.exponential(1.0, count)))
            covered += low <= math.log(2.0) <= high
        assert covered >= 940, count
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_a_step_of_decoding_costs_as_the_state_does():
    bounded, cache = Layer("linear", True, 32, 2), Layer("softmax", True, 32, 2)
    assert layer_call(bounded, 40, "decode")().shape == (1, 1, 32)
    x, _ = random_input(cache, 40)
    whole = build_layer(cache, 40).eval()(torch.cat((x, x[:, :1]), dim=1))[:, -1:]
    torch.testing.assert_close(layer_call(cache, 40, "decode")(), whole)
    assert not can_stream(Layer("pooling", False, 16, 2)) and not can_stream(Layer("softmax", False, 16, 2))


def test_cuda_work_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert clock_of("cuda:0")() > 0 and waited == ["cuda:0"]
    clock_of("cpu")()
    assert waited == ["cuda:0"]


def test_memory_of_a_layer_is_that_of_its_scores():
    sigmoid = Layer("sigmoid", False, 32, 4)
    found = peak_bytes(sigmoid, 1024, "training")
    softmax = peak_bytes(sigmoid.baseline, 1024, "training")
    assert found is not None and softmax is not None
    assert softmax < found < 400 * 2**20, "blocks of scores cost more than the fused kernel"


def test_memory_is_unknown_where_the_process_dies():
    assert peak_bytes(Layer("softmax", True, 16, 2, options={"no_such_option": 1}), 8, "forward") is None


def test_flops_of_softmax_attention():
    n, dim = 64, 32
    projections = 4 * 2 * n * dim * dim
    assert layer_flops(Layer("softmax", False, dim, 2), n) == projections + 2 * 2 * n * n * dim
    assert layer_flops(Layer("softmax", True, dim, 2), n) == projections + 2 * n * n * dim


def test_flops_inside_custom_operators_count():
    layer = Layer("linear", True, 32, 2)
    assert layer_flops(layer, 128) > 4 * 2 * 128 * 32 * 32


def test_state_bytes():
    assert state_bytes(SMALL, 10) == 10 * 2 * 16 * 4 + 8
    assert state_bytes(Layer("linear", True, 16, 2), 10) == state_bytes(Layer("linear", True, 16, 2), 20)
    assert state_bytes(Layer("pooling", False, 16, 2), 10) is None


def test_inputs_of_grid_mixers_are_as_square_as_can_be():
    x, grid = random_input(Layer("pooling", False, 16, 2), 300)
    assert x.shape == (1, 300, 16) and grid in (None, (15, 20))


@pytest.mark.parametrize(
    ("default", "reference", "agrees", "holds"),
    [
        (0.90, 0.90, True, True),
        (0.90, 0.87, True, True),
        (0.90, 0.50, True, False),
        (0.90, 0.90, False, False),
        (0.90, None, True, None),
        (0.90, 0.90, None, None),
    ],
)
def test_the_controls_verdict(default, reference, agrees, holds):
    seeds = [[0.90, 0.92], [0.80, 0.83]]
    tie = judge("recall", default, reference, seeds, agrees, resolution=0.001)
    assert tie.holds is holds
    deviation = math.sqrt((0.02**2 / 2 + 0.03**2 / 2) / 2)
    assert tie.allowed == pytest.approx(math.sqrt(2) * deviation * 4.302653, rel=1e-6)


def test_the_control_without_a_second_seed_rests_on_rounding():
    assert judge("t", 0.9, 0.5, [[0.9], [0.8]], True, resolution=0.01).holds is True
    same = judge("t", 0.90, 0.91, [[0.9, 0.9]], True, resolution=0.01)
    assert same.allowed == 0.01 and same.holds is True, "one evaluation example is always allowed"


def test_machine_facts_are_complete():
    facts = machine_facts(measure=False)
    assert facts["cores"] >= 1 and facts["torch"] == torch.__version__ and facts["cpu"]
    assert "matmul_gflops" not in facts
