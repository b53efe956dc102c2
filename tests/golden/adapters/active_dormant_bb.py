"""The bigram-backcopy generator, and the Transformer and the analytic one-layer model that were run on it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import attnlab
from attnlab.tasks.bigram_backcopy.language import BigramLanguage, backcopy_sequences
from golden.layers import layer_norm, linear
from golden.recording import Recording, fill, renamed

PROVES = ("task:bigram_backcopy",)


def _tokens(recording: Recording) -> dict[str, Tensor]:
    config = recording.config
    marginal, transitions = (recording[f"param/{name}"].double().numpy() for name in ("marginal", "cond"))
    seed, batch, length, k = recording["in/bb_args"].tolist()
    start = int((marginal > 0).nonzero()[0][-1]) + 1  # delimiters have no probability, the first is the one in use
    language = BigramLanguage(marginal, transitions, k, start)
    plain = backcopy_sequences(language, batch, length, np.random.default_rng(seed))
    mixed = backcopy_sequences(language, batch, length, np.random.default_rng(seed + 1), config["mix_p"])
    return {
        "out/bb_tokens": torch.from_numpy(plain),
        "out/trigger_ids": torch.from_numpy(language.triggers.copy()),
        "out/trigger_pos": torch.from_numpy(language.is_trigger(plain)),
        "out/bb_interpolate_tokens": torch.from_numpy(mixed),
    }


def _transformer(recording: Recording) -> dict[str, Tensor]:
    config, weights, results = recording.config, recording.parameters(), {}
    tokens = recording["in/tokens"]
    x = weights["tok_embeddings.weight"][tokens] + weights["pos_embeddings.weight"][: tokens.shape[1]]
    names = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "out_proj"}
    for index in range(config["n_layers"]):
        layer = f"layers.{index}"
        mixer = attnlab.create_mixer(
            "relu" if config["attn_use_relu"] else "softmax",
            config["dim"],
            config["n_heads"],
            causal=True,
            out_bias=False,
            dtype=recording.dtype,
        )
        fill(mixer, renamed(weights, {f"{layer}.attention.{old}": new for old, new in names.items()}))
        h = layer_norm(weights, f"{layer}.attention_norm", x)
        results[f"out/attn_layer{index}"] = mixer.mixing_matrix(h)
        x = x + mixer(h)
        h = layer_norm(weights, f"{layer}.ff_norm", x)
        x = x + linear(weights, f"{layer}.ff.w2", F.relu(linear(weights, f"{layer}.ff.w1", h)))
    results["out/logits"] = linear(weights, "output", layer_norm(weights, "norm", x))
    return results


def _analytic(recording: Recording) -> dict[str, Tensor]:
    """Scores, values and the perceptron of the card: no residual stream, norms on the first token alone."""
    weights = recording.parameters("simple.layers.0.")
    tokens, triggers = recording["in/tokens"], recording["in/trigger_pos"]
    n, size = tokens.shape[1], weights["attention.wv"].shape[0]
    x = F.one_hot(tokens, size).to(recording.dtype)
    first = x[:, :1]
    rest = (torch.arange(n) > 0)[:, None]

    def attention(key: Tensor, gate: Tensor | None) -> Tensor:
        to_first = weights["attention.qk_bos"][tokens] * (key @ weights["attention.qk_direction"])
        to_last = weights["attention.qk_previous"][tokens]
        scores = torch.zeros(len(tokens), n, n, dtype=recording.dtype)
        scores[:, :, 0] += to_first
        scores += torch.diag_embed(to_last[:, 1:], -1)
        scores = scores if gate is None else scores * gate
        return scores.masked_fill(~torch.ones(n, n).tril().bool(), float("-inf")).softmax(-1)

    columns = torch.arange(n)
    gate = torch.where(triggers[..., None], columns == columns[:, None] - 1, columns == 0)
    weighed = attention(layer_norm(weights, "pre_attn_norm", first), gate)
    values = torch.where(rest, x * weights["attention.wv"], weights["attention.wv_bos"])
    h = torch.where(rest, x, layer_norm(weights, "pre_mlp_norm", first))
    return {
        "out/simple_attn_allones": attention(first, None),
        "out/simple_logits": weighed @ values + linear(weights, "ff.w2", F.relu(linear(weights, "ff.w1", h))),
    }


def run(recording: Recording) -> dict[str, Tensor]:
    """Tokens and triggers from the seed; both models on the recorded tokens."""
    return _tokens(recording) | _transformer(recording) | _analytic(recording)
