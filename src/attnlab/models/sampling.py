"""Token-by-token generation from a causal language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from attnlab.models.language import CausalLM


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def sample(logits: Float[Tensor, "b v"], temperature: float = 1.0, generator: torch.Generator | None = None) -> Int[Tensor, "b"]:
    """Draw from softmax(logits / temperature), or the most likely id at temperature 0."""
    if temperature == 0.0:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits.float() / temperature, -1), 1, generator=generator).squeeze(1)


def generate(
    model: CausalLM,
    prompt: Int[Tensor, "b n"],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b m"]:
    """`CausalLM.generate`."""
    if prompt.shape[1] < 1:
        raise ValueError(f"prompt: expected at least one token, got shape {tuple(prompt.shape)}")
    if num_tokens < 0 or temperature < 0.0:
        raise ValueError(f"num_tokens and temperature: expected values of at least 0, got {num_tokens} and {temperature}")
    pieces, streams = [prompt], model.streams
    with evaluating(model):
        state = model.init_state(prompt.shape[0]) if streams else None
        for _ in range(num_tokens):
            if state is not None:
                logits, state = model.extend(pieces[-1], state)
            else:
                logits = model(torch.cat(pieces, 1))
            pieces.append(sample(logits[:, -1], temperature, generator)[:, None])
    return torch.cat(pieces, 1)
