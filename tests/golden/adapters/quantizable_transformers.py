"""BERT's attention with a clipped softmax and with gates, and the clipped softmax as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer, record
from attnlab.ops.attention import ClippedSoftmax
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:quantizable",)

_SCOPES = {"conditional_per_token": "token", "conditional_per_head": "head", "unconditional": "unconditional"}


def _options(config: dict) -> dict:
    """Our options from theirs."""
    options = config["options"]
    ours: dict = {"gamma": 0.0}
    if options.get("alpha") is not None:
        ours = {"alpha": options["alpha"], "max_length": options["max_seq_length"]}
    elif isinstance(clip := options.get("softmax_fn"), dict):
        ours = {"gamma": clip["gamma"], "zeta": clip["eta"]}
    scope = _SCOPES.get(options.get("attn_gate_type", "none"))
    if scope is None:
        return ours
    kinds = {"attn_gate_linear_all_features": "all_features", "attn_gate_mlp": "mlp", "attn_gate_mlp2": "mlp2"}
    ours |= {"gate": next((ours for theirs, ours in kinds.items() if options.get(theirs)), "linear"), "gate_scope": scope}
    return ours | {"gate_init": options.get("attn_gate_init") or 0.5, "pretrained": bool(options.get("fine_tuning"))}


def _gate(weights: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The gate predictor: one layer for all heads, a list of one or two layers a head, or a number a head."""
    if "alpha" in weights:
        return {"gate.bias": weights["alpha"]}
    if "alpha.weight" in weights:
        return {"gate.out.weight": weights["alpha.weight"], "gate.bias": weights["alpha.bias"]}
    names = sorted({key.split(".", 2)[2] for key in weights if key.startswith("alpha.")})
    if not names:
        return {}

    def stacked(name: str) -> Tensor:
        return torch.stack([weights[f"alpha.{h}.{name}"] for h in range(heads)])

    layers = sorted({name.rpartition(".")[0] for name in names})
    first, last = (f"{layer}." if layer else "" for layer in (layers[0], layers[-1]))
    found = {"gate.out.weight": stacked(f"{last}weight"), "gate.bias": stacked(f"{last}bias")}
    if len(layers) == 2:
        found |= {"gate.hidden.weight": stacked(f"{first}weight"), "gate.hidden.bias": stacked(f"{first}bias")}
    return found


def _module(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    dim, heads, weights = config["dim"], config["heads"], recording.parameters(f"{name}.")
    mixer = create_mixer("quantizable", dim, heads, qkv_bias=True, out_bias=False, **_options(config)).to(recording.dtype)
    mapped = renamed(weights, {"query": "q_proj", "key": "k_proj", "value": "v_proj"}) | _gate(weights, heads)
    fill(mixer, mapped | {"out_proj.weight": torch.eye(dim, dtype=recording.dtype)})
    x, mask = recording.leaf(f"in/{name}.x"), recording.get(f"in/{name}.mask")
    # their mask leaves out keys alone: masked tokens have an output and are in the averages of gates a head
    with record(mixer) as tape:
        y = mixer(x) if mask is None else mixer(x, x, context_mask=(mask == 0).flatten(1))
    (y * recording[f"in/{name}.w"]).sum().backward()
    results = {f"out/{name}.y": y, f"grad/{name}.x": x.grad}
    if f"out/{name}.gate" in recording:
        shape, gates = recording[f"out/{name}.gate"].shape, tape["gates"].transpose(1, 2)
        full = gates.expand(x.shape[0], -1, -1) if gates.numel() != shape.numel() else gates
        full = full.expand(-1, -1, config["N"]) if full.numel() != shape.numel() else full
        results[f"out/{name}.gate"] = full.reshape(shape)
    return results


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        if name == "csoft":
            for index, (gamma, zeta) in enumerate(config):
                results[f"out/csoft{index}"] = ClippedSoftmax(gamma, zeta).weights(recording["in/csoft.logits"])
        else:
            results |= _module(recording, name, config)
    return results
