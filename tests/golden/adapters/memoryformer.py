"""The Memory Layer with its addresses, and the feed-forward block of two of them."""

from __future__ import annotations

from torch import Tensor

from attnlab.channel_mixers import create_channel_mixer
from attnlab.mixers.parts.lookup_linear import LookupLinear, lookup_addresses
from golden.recording import Recording, fill, renamed

PROVES = ("channel_mixer:memory",)


def run(recording: Recording) -> dict[str, Tensor]:
    config, weights = recording.config, recording.parameters()
    dim, tau = config["d"], config["tau"]
    x = recording.leaf("in/x")
    layer = LookupLinear(dim, config["out"], tau=tau, bias="bias" in weights).to(recording.dtype)
    fill(layer, renamed(weights, {"tables": "tables", "bias": "bias"}))
    rows, scores = lookup_addresses(x, tau)
    y = layer(x)
    (y * recording["in/w"]).sum().backward()
    results = {
        "out/y": y,
        "out/code": rows,
        "out/score": scores,
        "grad/x": x.grad,
        "grad/tables": layer.tables.grad.flatten(0, 1),
    }
    hidden = weights["ffn.1.weight"].shape[0]
    block = create_channel_mixer("memory", dim, hidden=hidden, tau=tau, extra_bits=config["extra"]).to(recording.dtype)
    fill(block, renamed(weights, {"ffn.0": "up", "ffn.1": "norm", "ffn.2": "down"}))
    x = recording.leaf("in/x")
    y = block(x)
    (y * recording["in/w_ffn"]).sum().backward()
    results |= {"out/ffn": y, "grad/x_ffn": x.grad}
    return {key: value for key, value in results.items() if key in recording}
