"""SPT's product quantiser with its loss, the agreement of codes, and the routed feed-forward."""

from __future__ import annotations

from torch import Tensor

from attnlab import create_mixer
from attnlab.channel_mixers import create_channel_mixer
from attnlab.mixers.parts.product_quantizer import match_count
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:product_quantized", "channel_mixer:routed_mlp")
LAYERS = {"fc1": "up", "gate": "up", "side": "side", "fc2": "down", "down": "down", "router.0": "router"}


def _quantizer(recording: Recording) -> dict[str, Tensor]:
    config, codebook = recording.config, recording["param/weight"]
    heads, width = config["H"], config["d_head"]
    mixer = create_mixer("product_quantized", heads * width, heads, code_width=config["d_codeword"], num_codes=config["E"])
    quantizer = mixer.to(recording.dtype).quantizer
    results, codes = {}, {}
    for name in ("q", "k"):
        fill(quantizer, {"codebook": codebook})
        quantizer.zero_grad()
        z = recording.leaf(f"in/{name}")
        codes[name] = quantizer.codes(z)
        loss = quantizer.loss(z)
        loss.backward()
        results |= {f"out/code_{name}": codes[name], f"out/quantized_{name}": quantizer.words(codes[name])}
        results |= {f"out/pq_loss_{name}": loss, f"grad/{name}": z.grad, f"grad/codebook_{name}": quantizer.codebook.grad}
    return results | {"out/match_count": match_count(codes["q"], codes["k"], config["E"]).long()}


def _feed_forward(recording: Recording) -> dict[str, Tensor]:
    config, weights = recording.config, recording.parameters("ffn.")
    gated = "gate.weight" in weights
    mlp = create_channel_mixer(
        "routed_mlp",
        config["d"],
        hidden=config["dff"],
        num_blocks=config["dff"] // config["block"],
        num_active=config.get("ffn_active_blocks"),
        gated=gated,
        activation=config["act"].lower(),
        bias="fc1.bias" in weights or "gate.bias" in weights,
    ).to(recording.dtype)
    fill(mlp, renamed(weights, LAYERS))
    x = recording.leaf("in/x")
    y = mlp(x)
    (y * recording["in/w"]).sum().backward()
    return {"out/ffn": y, "grad/x": x.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    """Both parts."""
    return _quantizer(recording) | _feed_forward(recording)
