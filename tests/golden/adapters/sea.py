"""SEA's estimate, choice, sparse attention and loss, on given queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.mixers.sparse.sea import View, ranks
from attnlab.mixers.sparse.sea_loss import context_loss, distillation_loss
from attnlab.mixers.sparse.sea_selection import kept_pairs
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:sea",)

_LAYERS = {
    "attention_predictor_enc.0": "encode",
    "attention_predictor_enc.1": "norm",
    "attention_predictor_dec_row.0": "rows",
    "attention_predictor_dec_scaler.0": "scaler",
    "attention_predictor_cnn.0.net.0": "first",
    "attention_predictor_cnn.0.net.2": "second",
    "attention_predictor_cnn.0.net.5": "last",
    "performer.projection_matrix": "directions",
}


def _mixer(recording: Recording, heads: int, width: int):
    config, weights = recording.config, recording.parameters()
    scope = config.get("k_flatten_dim", "causal_batch") if config.get("k_flatten", True) else "query"
    mixer = create_mixer(
        "sea", heads * width, heads, num_kept=config["k"], estimate_dim=config["predictor_length"], scope=scope
    ).to(recording.dtype)
    count, have = len(weights["performer.projection_matrix"]), mixer.estimator
    have.directions = have.directions.new_empty(count, width)
    fill(have, renamed(weights, _LAYERS))
    return mixer


@torch.no_grad()
def run(recording: Recording) -> dict[str, Tensor]:
    q, k, v = (recording[f"in/{name}"] for name in "qkv")
    _, heads, n, width = q.shape
    mixer = _mixer(recording, heads, width)
    real = recording["in/attention_mask"][:, 0, 0] > -1
    v = v.masked_fill(~real[:, None, :, None], 0.0)
    count, rank = real.sum(1), ranks(real)
    # theirs have padded keys in the kernel's normaliser and padded rows in the convolutions; ours would close up
    estimator, all_rows = mixer.estimator, torch.full((1,), n)
    places = estimator.places(count, n, v.dtype).take_along_dim(rank[:, None, :, None], dim=2)
    places = places.expand_as(v).masked_fill(~real[:, None, :, None], 0.0)
    c = estimator.kernel(q, k, torch.cat((places, v), dim=-1), torch.ones_like(real))
    estimate = estimator.decode(estimator.describe(c, v), all_rows)
    p = estimate.probabilities
    chosen = mixer.budget.choose(p, count[:, None], real)
    view = View(q, k, v, rank, count[:, None], estimate, chosen)
    context = mixer._paths(view, v, mixer._mean(view, v) * (count / n)[:, None, None, None]).transpose(1, 2).flatten(2)
    pairs = kept_pairs(chosen, count[:, None], n).take_along_dim(rank[:, None, None].expand(-1, heads, n, -1), dim=3)
    weights = mixer._paths(
        view._replace(estimate=estimate._replace(gates=_open(estimate.gates))), mixer.identity(k), v.new_zeros(*v.shape[:2], 1, n)
    )
    dense = q @ k.mT * width**-0.5
    teacher = dense.masked_fill(~real[:, None, None], float("-inf")).softmax(-1) @ v
    allowed = real[:, None, :, None] & real[:, None, None, :]
    loss = distillation_loss(view.resized(estimate.scores), dense, dense, allowed, sum_heads=True)
    return {
        "out/context": context,
        "out/partial_attention_mask_kept": pairs,
        "out/partial_attention_probs": weights,
        "out/estimated_probs_compressed": p.masked_fill(~real[:, None, :, None], 0.0),
        "out/estimated_probs_resized": view.resized(p),
        "out/loss": loss + context_loss(context, teacher.transpose(1, 2).flatten(2), real),
    }


def _open(gates: Tensor) -> Tensor:
    """The gate of the attention as it is, and nothing of the mean."""
    return torch.cat((gates[..., :1], torch.ones_like(gates[..., 1:])), dim=-1)
