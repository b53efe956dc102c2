"""Choosing a backend: explicit choices never fall back, and the choice is explained."""

from __future__ import annotations

import pytest
import torch

from attnlab import BackendUnavailableError, UnknownNameError, explain_backend, use_backend
from attnlab.ops.backends import Op


def test_an_explicit_choice_never_falls_back() -> None:
    op = Op("test_op", {"eager": abs}, limits={"eager": lambda x: "too small" if x.numel() < 2 else None})
    with pytest.raises(BackendUnavailableError, match="has no backend 'triton'"):
        op.explain("triton", torch.zeros(3))
    with pytest.raises(BackendUnavailableError, match="too small"):
        op.explain("eager", torch.zeros(1))


def test_auto_prefers_triton_only_on_a_gpu_and_says_why() -> None:
    choice = explain_backend("attention", torch.zeros(1))
    assert (choice.backend, choice.op) == ("eager", "attention")
    assert "cpu" in choice.reason


class OnGPU(torch.Tensor):
    """Says that it is on a GPU, where there is none."""

    is_cuda = True


def test_auto_leaves_alone_what_is_untried_and_an_explicit_choice_does_not() -> None:
    kernels = {"eager": abs, "triton": abs}
    choice = Op("untried_op", kernels, untried={"triton": "never ran"}).explain("auto", torch.zeros(1).as_subclass(OnGPU))
    assert (choice.backend, choice.reason) == ("eager", "triton is out: never ran")
    tried = Op("untried_op", kernels)
    assert tried.explain("auto", torch.zeros(1).as_subclass(OnGPU)).backend == "triton"
    assert Op("untried_op", kernels, untried={"triton": "never ran"}).explain("triton", torch.zeros(1)).backend == "triton"


def test_use_backend_is_undone() -> None:
    with use_backend("reference"):
        assert explain_backend("attention", torch.zeros(1)).backend == "reference"
        assert explain_backend("attention", torch.zeros(1), "eager").backend == "eager"
    assert explain_backend("attention", torch.zeros(1)).backend == "eager"
    with pytest.raises(UnknownNameError, match="did you mean 'reference'"), use_backend("refrence"):
        pass


def test_unknown_op() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'attention'"):
        explain_backend("atention", torch.zeros(1))


def test_a_lazy_implementation_is_imported_when_used() -> None:
    op = Op("lazy_op", {"eager": "math:sqrt"})
    assert op("eager", torch.zeros(1))(4.0) == 2.0
