"""How much of dense attention's mass sparse mechanisms keep with their published defaults, on random and on trained inputs.

A small causal language model (Python's own sources) and a small image encoder (handwritten digits) are trained with softmax
attention. Each sparse mechanism then takes over queries, keys and values of a trained layer, whatever it has beside these stays
as it was built, and the mass of the dense weights on the pairs that it uses is measured on held-out tokens; "random" is the same
with layers as they are built and normal tokens.

    python scripts/bench/attention_mass.py [--steps 300] [--out docs/data/attention_mass.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from attnlab import Mixer, create_mixer, list_mixers, mixer_info
from attnlab.mixers.attention import AttentionMixer
from attnlab.models import create_model
from attnlab.ops.maps.mass import kept_mass
from attnlab.tasks import create_task
from attnlab.training import train

FAMILIES = ("local", "partitioned", "sparse")
DIM, HEADS = 64, 4
BLOCK = "blocks.1"


def hidden_states(model: torch.nn.Module, inputs: Tensor) -> Tensor:
    """What the second layer's mixer sees."""
    seen: list[Tensor] = []
    mixer = next(module for name, module in model.named_modules() if name.startswith(BLOCK) and isinstance(module, Mixer))
    handle = mixer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(inputs)
    handle.remove()
    return seen[0]


def layer_of(model: torch.nn.Module) -> Mixer:
    """The second layer's mixer."""
    return next(module for name, module in model.named_modules() if name.startswith(BLOCK) and isinstance(module, Mixer))


def text(steps: int) -> tuple[Mixer, Tensor]:
    """A trained causal layer and what it sees of 4 held-out sequences of 512 bytes."""
    task = create_task("stdlib_text", seq_len=512)
    options = {"num_heads": HEADS, "position": "learned", "max_length": 512}
    model = create_model("causal_lm", vocab_size=256, dim=DIM, depth=2, mixer="softmax", **options)
    train(model, task, steps=steps, batch_size=4, learning_rate=3e-3, seed=0, eval_split=None)
    batch = next(iter(task.eval_batches(4, "valid")))
    return layer_of(model), hidden_states(model, batch.inputs)


def measure(name: str, source: Mixer, x: Tensor, grid: tuple[int, ...] | None, trained: bool) -> float | None:
    """The mass that a mechanism with its defaults keeps of ``source``'s weights; None if it cannot take that layer's place."""
    torch.manual_seed(0)
    causal = source.causal
    if causal and mixer_info(name).supports.causal == "no":
        return None
    try:
        mixer = create_mixer(name, DIM, HEADS, causal=causal).eval()
    except (ValueError, TypeError):
        return None
    if not isinstance(mixer, AttentionMixer) or not mixer.supports.mixing_matrix:
        return None
    own, given = mixer.state_dict(), source.state_dict()
    fitting = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    if not {"q_proj.weight", "k_proj.weight"} <= set(fitting):
        return None
    if trained:
        mixer.load_state_dict(own | fitting)
    else:
        source = create_mixer("softmax", DIM, HEADS, causal=causal)
        source.load_state_dict({key: own[key] for key in source.state_dict() if key in own}, strict=False)
    with torch.no_grad():
        kept = mixer.mixing_matrix(x, grid=grid) != 0
        return float(kept_mass(source.mixing_matrix(x), kept).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of dense attention's mass that sparse mechanisms keep.")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--out", type=Path, default=Path("docs/data/attention_mass.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    layer, tokens = text(options.steps)
    rows = {}
    for name in [name for family in FAMILIES for name in list_mixers(family=family)]:
        found = {
            "random": measure(name, layer, torch.randn_like(tokens), None, trained=False),
            "trained": measure(name, layer, tokens, None, trained=True),
        }
        if found["trained"] is not None:
            rows[name] = found
            print(f"{name:24s} random {found['random']:.3f}   trained {found['trained']:.3f}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"steps": options.steps, "tokens": tokens.shape[1], "mixers": rows}, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
