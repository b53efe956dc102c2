"""The delta rule as an op, and the DeltaNet layer."""

from __future__ import annotations

from torch import Tensor

from attnlab import create_mixer
from attnlab.ops.delta_rule import delta_rule
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:delta_net",)


def _op(recording: Recording) -> dict[str, Tensor]:
    leaves = {name: recording.leaf(f"in/{name}") for name in ("q", "k", "v", "beta")}
    initial = recording.leaf("in/initial_state") if "in/initial_state" in recording else None
    o, state = delta_rule(**leaves, initial_state=initial)
    (o * recording["in/w"]).sum().backward()
    results = {"out/o": o, "out/final_state": state}
    results |= {f"grad/{name}": leaf.grad for name, leaf in leaves.items()}
    if "grad/initial_state" in recording and initial is not None:
        results["grad/initial_state"] = initial.grad
    return results


def _layer(recording: Recording, config: dict) -> dict[str, Tensor]:
    weights = recording.parameters("layer.")
    dim = config["hidden_size"]
    conv = weights.get("q_conv1d.weight")
    mixer = create_mixer(
        "delta_net",
        dim,
        config["num_heads"],
        expand_k=weights["k_proj.weight"].shape[0] / dim,
        expand_v=weights["v_proj.weight"].shape[0] / dim,
        conv_size=0 if conv is None else conv.shape[-1],
        beta="sigmoid" if "b_proj.weight" in weights else "one",
        negative_eigenvalues=config.get("allow_neg_eigval", False),
        gate="g_proj.weight" in weights,
        qk_activation=config.get("qk_activation", "silu"),
        qk_norm=config.get("qk_norm", "l2"),
        norm_eps=config.get("norm_eps", 1e-5),
    ).to(recording.dtype)
    names = {name: name for name in ("q_proj", "k_proj", "v_proj", "b_proj", "g_proj")}
    names |= {"o_proj": "out_proj", "o_norm": "out_norm"}
    names |= {f"{part}_conv1d": f"convs.{part}" for part in "qkv"}
    fill(mixer, renamed(weights, names))
    x = recording.leaf("in/layer_x")
    y = mixer(x)
    (y * recording["in/layer_w"]).sum().backward()
    return {"out/layer_y": y, "grad/layer_x": x.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    results = _op(recording)
    if "in/layer_x" in recording:
        results |= _layer(recording, recording.config["layer"])
    return results
