"""Models that take any registered mixer; `list_models` names them.

``create_model("causal_lm", vocab_size=, dim=, depth=, mixer="softmax", num_heads=4, mixer_options=None, channel_mixer="mlp",
channel_options=None, norm="rms_norm", position="none", max_length=None, tie_embeddings=True, device=None, dtype=None)``
maps tokens (batch, n) to logits (batch, n, vocab_size).

``create_model("encoder", num_classes=, dim=, depth=, mixer="softmax", ..., input="tokens", vocab_size=None, patch_dim=None,
grid=None, pool="mean")`` maps tokens (batch, n) or patches (batch, n, patch_dim) to logits (batch, num_classes).

Both are called ``model(inputs, mask=None)``.
"""

from __future__ import annotations

from attnlab.models.budget import Matched, count_parameters, match_budget
from attnlab.models.registry import create_model, list_models, model_info, models

__all__ = ["Matched", "count_parameters", "create_model", "list_models", "match_budget", "model_info", "models"]
