"""A block of Transformer in Transformer."""

from __future__ import annotations

from torch import Tensor

from attnlab import Tokens
from attnlab.models import create_model
from golden.recording import Recording, fill, renamed, rows

PROVES = ("model:two_level",)


def _block(weights: dict[str, Tensor], level: str) -> dict[str, Tensor]:
    """Inner or outer block by our names."""
    dim = len(weights[f"{level}_norm1.weight"])
    inside = f"{level}.channel_mixer." + ("inside." if level == "outer" and "se_layer.fc.1.weight" in weights else "")
    values = rows(weights, f"{level}_attn.qk", {f"{level}.mixer.q_proj": dim, f"{level}.mixer.k_proj": dim})
    names = {"norm1": "mixer_norm", "norm2": "channel_norm", "attn.v": "mixer.v_proj", "attn.proj": "mixer.out_proj"}
    values |= renamed(weights, {f"{level}_{old}": f"{level}.{new}" for old, new in names.items()})
    return values | renamed(weights, {f"{level}_mlp.fc1": f"{inside}up", f"{level}_mlp.fc2": f"{inside}down"})


def run(recording: Recording) -> dict[str, Tensor]:
    config, weights = recording.config, recording.parameters()
    squeezed = weights.get("se_layer.fc.1.weight")
    dim, bias = config["outer_dim"], {"qkv_bias": config["qkv_bias"]}
    block = create_model(
        "two_level",
        dim=dim,
        inner_dim=config["inner_dim"],
        words=(config["num_words"],),
        num_heads=config["outer_num_heads"],
        inner_heads=config["inner_num_heads"],
        mixer_options=bias,
        inner_options=bias,
        squeeze=None if squeezed is None else (len(squeezed) + 0.5) / dim,
        dtype=recording.dtype,
    )
    names = {"proj": "inject", "proj_norm1": "words_norm", "proj_norm2": "inject_norm"}
    gate = {"se_layer.fc.0": "norm", "se_layer.fc.1": "down", "se_layer.fc.3": "up"}
    names |= {old: f"outer.channel_mixer.{new}" for old, new in gate.items()}
    fill(block, _block(weights, "inner") | _block(weights, "outer") | renamed(weights, names))
    inner, outer = recording.leaf("in/inner"), recording.leaf("in/outer")
    words = inner.unflatten(0, (len(outer), -1))
    tokens = block(Tokens(outer, num_prefix=1, streams={"words": words}))
    (tokens.x * recording["in/w"]).sum().backward()
    after = tokens.streams["words"].flatten(0, 1)
    return {"out/outer": tokens.x, "out/inner": after, "grad/inner": inner.grad, "grad/outer": outer.grad}
