"""Kernels written in Triton: in its interpreter where there is no GPU, and on a GPU where there is one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from attnlab import BackendUnavailableError, explain_backend
from attnlab.ops.linear_attention import linear_attention
from ops import triton_cases as cases

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

Run = Callable[..., Any]
BOTH = [torch.float32, torch.bfloat16]

LINEAR = [
    (1, 2, 1, 3, 4, True, True),
    (2, 3, 33, 5, 7, True, True),
    (2, 1, 65, 8, 3, False, False),
    (1, 1, 130, 5, 70, True, True),
    (1, 1, 40, 100, 18, True, False),
    (1, 1, 20, 3, 140, False, True),
]
SCANS = [
    (1, 1, 3, 2, "token", "token", True),
    (2, 17, 6, 3, "2", "2", True),
    (1, 37, 40, 3, "token", "token", True),
    (1, 70, 6, 2, "constant", "token", True),
    (2, 20, 5, 3, "1", "constant", True),
    (1, 140, 3, 2, "constant", "constant", False),
    (1, 9, 4, 40, "token", "token", True),
]
TILES = [
    ((1, 2, 1, 5, 7, 3, 5, 2, 3, 4), {"kinds": 2, "own": True}),
    ((2, 4, 2, 40, 33, 20, 9, 3, 37, 70), {"causal": True, "masked": True}),
    ((1, 1, 1, 9, 9, 4, 4, 4, 4, 5), {"outside": "zero", "masked": True, "own": True}),
]
if torch.cuda.is_available():  # too slow to interpret
    TILES += [
        ((2, 8, 2, 1000, 1000, 64, 64, 30, 64, 300), {"kinds": 5, "own": True}),
        ((1, 4, 4, 3000, 3000, 128, 100, 100, 33, 500), {"causal": True, "masked": True, "own": True}),
    ]
    LINEAR += [
        (2, 3, 1000, 64, 64, True, True),
        (1, 2, 3001, 128, 128, True, True),
        (2, 8, 700, 64, 65, False, True),
        (1, 2, 333, 32, 256, True, True),
        (1, 2, 500, 100, 200, True, False),
    ]
    SCANS += [
        (2, 1000, 512, 16, "token", "token", True),
        (1, 3001, 300, 16, "3", "3", True),
        (1, 700, 128, 64, "token", "token", True),
        (1, 500, 96, 16, "constant", "constant", True),
        (1, 300, 64, 128, "token", "token", False),
    ]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Calls a case where Triton can run."""
    if torch.cuda.is_available():
        yield lambda case, *arguments: case(*arguments)
        return
    with cases.run_elsewhere() as pool:
        yield lambda case, *arguments: pool.submit(case, *arguments).result(timeout=120)


def assert_within(found: list[tuple[float, float]]) -> None:
    assert all(error <= budget for error, budget in found), [f"{error:.1e} of {budget:.1e}" for error, budget in found]


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_attention_equals_the_recurrence_in_values_and_gradients(run, case, dtype):
    *shape, decay, state = case
    assert_within(run(cases.linear_attention, *shape, dtype, decay, state))


@pytest.mark.parametrize("case", SCANS, ids=str)
def test_the_scan_equals_the_recurrence_in_values_and_gradients(run, case):
    assert_within(run(cases.scan, *case))


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("case", TILES, ids=str)
def test_tiles_equal_the_formula_in_values_and_gradients(run, case, dtype):
    shape, options = case
    assert_within(run(functools.partial(cases.tiles, **options), *shape, dtype))


@pytest.mark.parametrize("log_decay", [0.0, -torch.inf])
def test_extreme_decays(run, log_decay):
    assert run(cases.no_decay_at_all_and_none_left, log_decay) < 1e-5


@pytest.mark.parametrize("splits", [[1, 1, 70], [64, 8], [30, 1, 41]], ids=str)
def test_pieces_with_the_state_handed_on_equal_one_pass(run, splits):
    assert run(cases.pieces, splits) < 1e-5


def test_the_ops_are_registered_as_pytorch_wants(run):
    run(cases.registered)


def test_compiled_whole(run):
    assert run(cases.compiled) < 1e-5


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (torch.zeros(1, 1, 2, 4), "Triton needs a GPU"),
        (torch.zeros(1, 1, 2, 4, dtype=torch.float64), "float32 and bfloat16, got torch.float64"),
        (torch.zeros(1, 1, 2, 129), "width 128 at most, got 129"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(sample, reason):
    with pytest.raises(BackendUnavailableError, match=reason):
        linear_attention(sample, sample, sample, backend="triton")


def test_a_gpu_is_used_for_what_is_tested_alone():
    assert explain_backend("linear_attention", torch.zeros(1, 1, 2, 4)).backend == "eager"
    if torch.cuda.is_available():
        assert explain_backend("linear_attention", torch.zeros(1, 1, 2, 4, device="cuda")).backend == "triton"
        wide = explain_backend("linear_attention", torch.zeros(1, 1, 2, 4, device="cuda", dtype=torch.float64))
        assert wide.backend == "eager" and "float64" in wide.reason
