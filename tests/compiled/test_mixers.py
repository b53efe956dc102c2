"""Every mixer under compilation, export, autocast, checkpointing, the meta device and a state-dict round trip."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attnlab import Mixer, create_mixer, list_mixers, mixer_info

NAMES = list_mixers()
STREAMING = list_mixers(streaming=True)
N, DIM, HEADS = 12, 16, 4


def _build(name: str, causal: bool | None = None, **place) -> Mixer:
    info = mixer_info(name)
    causal = info.supports.causal == "always" if causal is None else causal
    torch.manual_seed(0)
    return create_mixer(name, DIM, HEADS, causal=causal, **dict(info.example), **place)


def _forms(name: str) -> list[bool]:
    """The values of ``causal`` that the mixer has."""
    return {"no": [False], "always": [True], "optional": [False, True]}[mixer_info(name).supports.causal]


CASES = [pytest.param(name, causal, id=f"{name}-{'causal' if causal else 'both'}") for name in NAMES for causal in _forms(name)]


def _grid(mixer: Mixer) -> dict[str, tuple[int, int]]:
    """The grid that a mixer has to be told where it takes no sequence."""
    return {} if 1 in mixer.supports.grid else {"grid": (3, N // 3)}


def _gradients(mixer: Mixer, run, x: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    mixer.zero_grad()
    torch.manual_seed(2)  # what is drawn in training is drawn alike
    leaf = x.clone().requires_grad_()
    y = run(leaf, mask=mask, **_grid(mixer))
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in mixer.parameters() if p.grad is not None)]


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, 8:] = False
    return torch.randn(2, N, DIM), mask


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_compiles_in_one_graph_forward_and_backward(name, causal, inputs) -> None:
    torch._dynamo.reset()
    mixer = _build(name, causal)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(_gradients(mixer, compiled, *inputs), _gradients(mixer, mixer, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", STREAMING)
def test_streaming_compiles(name, inputs) -> None:
    torch._dynamo.reset()
    mixer = _build(name, True).eval()
    x, mask = inputs
    compiled = torch.compile(mixer.extend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y, state = mixer.extend(x[:, :5], mixer.init_state(2), mask=mask[:, :5])
        z, _ = compiled(x[:, 5:], state, mask=mask[:, 5:])
        torch.testing.assert_close(torch.cat((y, z), 1), mixer(x, mask=mask))


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_exports(name, causal, inputs) -> None:
    torch._dynamo.reset()
    mixer = _build(name, causal).eval()
    x, mask = inputs
    given = {"mask": mask, **_grid(mixer)}
    program = torch.export.export(mixer, (x,), given)
    torch.testing.assert_close(program.module()(x, **given), mixer(x, **given))


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_autocast(name, causal, inputs) -> None:
    mixer = _build(name, causal).eval()
    x, mask = inputs
    given = {"mask": mask, **_grid(mixer)}
    exact = mixer(x, **given).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x.requires_grad_(), **given)
    y.float().square().sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters() if p.grad is not None)
    # bfloat16 keeps 8 bits, about 0.4 % a product; where rounding flips a choice there is no bound
    assert mixer.supports.discontinuous or float((y.detach().float() - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients(name, inputs) -> None:
    mixer = _build(name)

    def recomputed(x: torch.Tensor, mask: torch.Tensor, **grid: tuple[int, int]) -> torch.Tensor:
        return checkpoint(mixer, x, mask=mask, use_reentrant=False, **grid)

    for ours, theirs in zip(_gradients(mixer, recomputed, *inputs), _gradients(mixer, mixer, *inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_meta_device(name, causal) -> None:
    mixer = _build(name, causal, device=torch.device("meta"))
    assert all(p.is_meta for p in mixer.parameters())
    mask = torch.ones(2, N, dtype=torch.bool, device="meta")
    y = mixer.to("meta")(torch.empty(2, N, DIM, device="meta"), mask=mask, **_grid(mixer))
    assert y.is_meta
    assert y.shape == (2, N, DIM)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name, inputs) -> None:
    mixer = _build(name)
    torch.manual_seed(5)
    other = create_mixer(name, DIM, HEADS, causal=mixer.causal, **dict(mixer_info(name).example))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1)
    other.load_state_dict(mixer.state_dict(), strict=True)
    mixer.eval(), other.eval()
    assert torch.equal(other(inputs[0], **_grid(mixer)), mixer(inputs[0], **_grid(mixer)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # from within torch
def test_inductor(name, inputs) -> None:
    torch._dynamo.reset()
    mixer = _build(name).double().eval()  # inductor draws other numbers in training
    x, mask = inputs
    compiled = torch.compile(mixer, fullgraph=True)
    for ours, theirs in zip(
        _gradients(mixer, compiled, x.double(), mask), _gradients(mixer, mixer, x.double(), mask), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
