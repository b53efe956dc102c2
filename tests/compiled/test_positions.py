"""Softmax attention with every position under compilation."""

from __future__ import annotations

import pytest
import torch

from attnlab import Mixer, create_mixer
from attnlab.positions import positions

N, DIM, HEADS = 6, 16, 4


def _mixer(name: str, **options) -> Mixer:
    torch.manual_seed(0)
    mixer = create_mixer("softmax", DIM, HEADS, position=name, **options)
    with torch.no_grad():
        for parameter in mixer.position.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def _gradients(mixer: Mixer, run, x: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    mixer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = run(leaf, mask=mask, grid=(2, 3))
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in mixer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", positions.names())
def test_compiles_in_one_graph_forward_and_backward(name) -> None:
    torch._dynamo.reset()
    mixer, x, mask = _mixer(name), torch.randn(2, N, DIM), torch.tensor([[True] * N, [True] * 4 + [False] * 2])
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(_gradients(mixer, compiled, x, mask), _gradients(mixer, mixer, x, mask), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", [name for name in positions.names() if not positions.get(name).factory.reads_future])
def test_streaming_compiles(name) -> None:
    torch._dynamo.reset()
    known = {option.name for option in positions.info(name).options}
    options = {key: value for key, value in {"rank": 1, "span": N, "size": N}.items() if key in known}
    mixer, x = _mixer(name, causal=True, position_options=options), torch.randn(2, N, DIM)
    compiled = torch.compile(mixer.extend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y, state = mixer.extend(x[:, :4], mixer.init_state(2))
        z, _ = compiled(x[:, 4:], state)
        torch.testing.assert_close(torch.cat((y, z), 1), mixer(x))
