"""The layer of sparse state expansion, on both of its rules."""

from __future__ import annotations

from torch import Tensor

from attnlab import create_mixer, record
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:sparse_state_expansion",)


def _layer(recording: Recording, rule: str, config: dict) -> dict[str, Tensor]:
    weights = recording.parameters(f"{rule}.")
    heads, branches = config["num_heads"], ("0", "1")
    mixer = create_mixer(
        "sparse_state_expansion",
        config["hidden_size"],
        heads,
        rule=rule,
        head_dim=config["head_dim"],
        expand_v=config["expand_v"],
        num_partitions=config["num_sparse_partition"],
        num_writers=config["num_writer"],
        num_readers=config["num_reader"],
        key_softmax=config.get("use_k_softmax", rule == "gla"),
        query_softmax=config.get("use_q_softmax", False),
        norm_eps=config.get("norm_eps", 1e-5),
    ).to(recording.dtype)
    names = {name: name for name in ("q_proj", "k_proj", "v_proj", "e_proj", "g_proj", "b_proj")}
    names |= {"lora_q_proj": "q_correction", "lora_k_proj": "k_correction", "o_norm": "out_norm", "o_proj": "out_proj"}
    if rule == "gla":
        names |= {f"gk_proj.{i}.{j}": f"decays.{i}.{part}" for i in branches for j, part in (("0", "down"), ("1", "up"))}
    else:
        # the port has both branches in one map, the shared one's heads first
        both = {name: weights.pop(name).split(heads) for name in ("a_proj.weight", "A_log", "dt_bias")}
        parts = {"a_proj.weight": "proj.weight", "A_log": "A_log", "dt_bias": "bias"}
        weights |= {f"decays.{i}.{parts[name]}": both[name][int(i)] for i in branches for name in parts}
        names |= {f"decays.{i}": f"decays.{i}" for i in branches}
    fill(mixer, renamed(weights, names))
    x = recording.leaf(f"in/{rule}_x")
    with record(mixer, only=["routing", "balance_loss"]) as tape:
        y = mixer(x)
    (y * recording[f"in/{rule}_w"]).sum().backward()
    return {
        f"out/{rule}": y,
        f"grad/{rule}_x": x.grad,
        f"out/{rule}_routing_softmax": tape["routing"],
        f"out/{rule}_aux_loss": tape["balance_loss"],
    }


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for rule, config in recording.config.items():
        results |= _layer(recording, rule, config)
    return results
