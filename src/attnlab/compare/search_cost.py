"""What a candidate of a search space costs, by counting its layers one by one."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from attnlab.channel_mixers import create_channel_mixer
from attnlab.compare.cost import layer_flops
from attnlab.compare.layers import Layer
from attnlab.models.search_space import Candidate, LayerChoice


def candidate_flops(candidate: Candidate, tokens: int, *, causal: bool = True, channel_mixer: str = "mlp") -> int:
    """Floating-point operations of matrix products and convolutions of all layers for one sequence, forward.

    Args:
        candidate: the layers; embedding and head are not counted, they are the same for all of a width.
        tokens: length of the sequence.
        causal: which form the mixers have.
        channel_mixer: a registered channel mixer.
    """
    total = 0
    known: dict[LayerChoice, int] = {}
    x = torch.zeros(1, tokens, candidate.dim)
    for choice in candidate.layers:
        if choice not in known:
            channel = create_channel_mixer(channel_mixer, candidate.dim, hidden=choice.hidden)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                channel(x)
            layer = Layer(choice.mixer, causal=causal, dim=candidate.dim, num_heads=choice.num_heads)
            known[choice] = layer_flops(layer, tokens) + counter.get_total_flops()
        total += known[choice]
    return total
