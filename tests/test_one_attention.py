"""The dense operator is one: nothing outside ``ops/`` turns scores over tokens into attention by itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "attnlab"
NAMES = {"softmax", "log_softmax", "_softmax", "logsumexp", "Softmax", "scaled_dot_product_attention", "MultiheadAttention"}

# A softmax that is not attention over tokens, and why. An entry that is no longer needed fails the test.
ALLOWED = {
    "channel_mixers/union_mlp.py": "a gate over experts",
    "mixers/channel/channel_group.py": "channels attend to channels: d x d maps",
    "mixers/graph/reversed.py": "a choice among heads",
    "mixers/heads/mixture.py": "a gate over experts",
    "mixers/heads/routers.py": "a gate over heads",
    "mixers/heads/union_of_experts.py": "a gate over heads",
    "mixers/linear/rala.py": "weights of the keys, from one mean query",
    "mixers/linear/sparse_state.py": "a gate over partitions, and keys over their channels",
    "mixers/local/contextual_mixing.py": "predicted kernels, which have no keys",
    "mixers/local/local_implicit.py": "weights of a window's places a frame, by which values are set side by side, not summed",
    "mixers/local/outlook.py": "predicted weights of the places of a window, which have no queries and keys",
    "mixers/parts/features.py": "features of one token, over its channels",
    "mixers/parts/routed_lora.py": "a gate over experts",
    "mixers/pooled/token_pooling.py": "a gate over scales of pooling",
    "mixers/sparse/bi_level_routing.py": "weights of the chosen regions",
    "mixers/sparse/mask_predictor.py": "coefficients over the entries of a basis",
    "mixers/sparse/sea_estimator.py": "probabilities of compressed columns",
    "mixers/sparse/sea_loss.py": "a divergence between maps",
    "mixers/sparse/subsampled.py": "class probabilities of an ensemble",
    "models/sampling.py": "probabilities of the next token",
    "objectives/transition_distillation.py": "a cross-entropy",
    "reducers/low_rank_pooling.py": "weights of a pooling, which has no queries and keys",
}


def calls(text: str) -> list[int]:
    """Lines on which something of `NAMES` is called."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in NAMES:
                found.append(node.lineno)
    return found


def test_softmax_attention_has_one_implementation() -> None:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).as_posix()
        if not place.startswith("ops/") and (lines := calls(path.read_text(encoding="utf-8"))):
            found[place] = lines
    unknown = {place: lines for place, lines in found.items() if place not in ALLOWED}
    assert not unknown, f"call attnlab.ops.attention, or give a reason in ALLOWED: {unknown}"
    assert not set(ALLOWED) - set(found), f"no longer needed in ALLOWED: {set(ALLOWED) - set(found)}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("w = torch.softmax(q @ k.mT, -1)", True),
        ("w = (q @ k.mT).softmax(-1)", True),
        ("o = F.scaled_dot_product_attention(q, k, v)", True),
        ("m = nn.MultiheadAttention(8, 2)", True),
        ("o = attention(q, k, v, normalizer='softmax')", False),
        ("'softmax(q k) v'", False),
    ],
)
def test_planted_calls_are_judged(text: str, found: bool) -> None:
    assert bool(calls(text)) == found
