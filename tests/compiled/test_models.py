"""Whole models under compilation and export: one graph, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from attnlab import Tokens
from attnlab.models import create_model

N = 12


class Case(NamedTuple):
    """A module of tensors alone, and its inputs: by keyword, the masks last."""

    module: nn.Module
    inputs: dict[str, Tensor]
    masks: dict[str, Tensor]


class OnTokens(nn.Module):
    """A model of `Tokens` as a module of tensors, which is what can be exported."""

    def __init__(self, model: nn.Module, results: Callable[[Tokens], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.model, self.results = model, results

    def forward(self, x: Tensor, mask: Tensor | None = None, **streams: Tensor) -> tuple[Tensor, ...]:
        return self.results(self.model(Tokens(x, mask, streams=streams)))


def real(n: int = N) -> Tensor:
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1, n - n // 3 :] = False
    return mask


def block_transformer(**options) -> Case:
    model = create_model("block_transformer", vocab_size=7, dim=8, block_depth=1, token_depth=1, num_heads=2, **options)
    return Case(model, {"tokens": torch.randint(7, (2, N - 1))}, {"mask": real(N - 1)})


def local_latents(**options) -> Case:
    given = {"dim": 8, "latent_dim": 6, "group": (5,), "num_latents": 2, "stages": ((1, 1), (1, 1))}
    model = create_model("local_latents", **given, num_heads=2, latent_heads=2, **options)
    return Case(OnTokens(model, lambda y: (y.x, y.streams["latents"])), {"x": torch.randn(2, N, 8)}, {"mask": real()})


def two_level() -> Case:
    block = create_model("two_level", dim=8, inner_dim=4, words=(2, 2), num_heads=2, inner_heads=2)
    inputs = {"x": torch.randn(2, N, 8), "words": torch.randn(2, N, 4, 4)}
    return Case(OnTokens(block, lambda y: (y.x, y.streams["words"])), inputs, {"mask": real()})


def tagger() -> Case:
    model = create_model("tagger", num_outputs=3, dim=8, depth=1, num_heads=2, vocab_size=7, causal=True)
    return Case(model, {"inputs": torch.randint(7, (2, N))}, {"mask": real()})


def tagger_of_two() -> Case:
    model = create_model("tagger", num_outputs=3, dim=8, depth=1, num_heads=2, input_dim=2, context_vocab_size=7)
    inputs = {"inputs": torch.randn(2, N, 2), "context": torch.randint(7, (2, 9))}
    return Case(model, inputs, {"mask": real(), "context_mask": real(9)})


def pointer() -> Case:
    model = create_model("pointer", input_dim=2, dim=8, depth=1, num_heads=2)
    inputs = {"inputs": torch.randint(9, (2, 4)), "context": torch.rand(2, 9, 2)}
    return Case(model, inputs, {"mask": real(4), "context_mask": real(9)})


def matching() -> Case:
    model = create_model("matching", vocab_size=7, dim=8, depth=1, num_heads=2, max_length=N)
    inputs = {"inputs": torch.randint(7, (2, N)), "context": torch.randint(7, (2, 9))}
    return Case(model, inputs, {"mask": real(), "context_mask": real(9)})


CASES = {
    "block_transformer": block_transformer,
    "block_transformer-sum": lambda: block_transformer(conditioning="sum"),
    "local_latents": local_latents,
    "local_latents-causal": lambda: local_latents(causal=True),
    "two_level": two_level,
    "tagger": tagger,
    "tagger-of-two": tagger_of_two,
    "pointer": pointer,
    "matching": matching,
}
MODELS = pytest.mark.parametrize("name", CASES)
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])


def _make(name: str, masked: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, inputs, masks = CASES[name]()
    return module.eval(), inputs | (masks if masked else {})


def _results(module: nn.Module, run: Callable, inputs: dict[str, Tensor]) -> list[Tensor]:
    module.zero_grad()
    leaves = {key: x.clone().requires_grad_() if x.is_floating_point() else x for key, x in inputs.items()}
    found = run(**leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    sum(y.square().sum() for y in outputs).backward()
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    assert gradients
    return [y.detach() for y in outputs] + gradients + [x.grad for x in leaves.values() if x.grad is not None]


@MODELS
@torch._dynamo.config.patch(allow_rnn=True)  # the pointer's decoder is torch's LSTM, which is not traced unless asked for
def test_compiles_in_one_graph_forward_and_backward(name) -> None:
    module, inputs = _make(name, True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(_results(module, compiled, inputs), _results(module, module, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@MODELS
@MASKED
@pytest.mark.filterwarnings("ignore:The tensor attributes self.decoder._flat_weights:UserWarning")  # of torch's LSTM
def test_exports(name, masked) -> None:
    module, inputs = _make(name, masked)
    program = torch.export.export(module, (), inputs)
    torch.testing.assert_close(program.module()(**inputs), module(**inputs))


@MODELS
def test_meta_device(name) -> None:
    module, inputs = _make(name, True)
    wanted = module(**inputs)
    found = module.to("meta")(**{key: x.to("meta") for key, x in inputs.items()})
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    assert all(a.is_meta and a.shape == b.shape for a, b in pairs)
