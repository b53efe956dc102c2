"""attnlab: attention mechanisms under one contract, each proven against its definition, fast on CPU and GPU, comparable.

import attnlab

mixer = attnlab.create_mixer("delta_net", dim=256, num_heads=4, causal=True)
attnlab.list_mixers(causal=True, streaming=True)
attnlab.check(mixer)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnlab.core.catalog import create_mixer, list_mixers, mixer_info
from attnlab.core.contract import Mixer
from attnlab.core.dynamics import Dynamics
from attnlab.core.errors import AttnlabError, BackendUnavailableError, UnknownNameError, UnsupportedError
from attnlab.core.info import Info, MixerInfo, Supports
from attnlab.core.record import record
from attnlab.core.registry import Registry
from attnlab.core.state import Before, State
from attnlab.core.streaming import StreamingMixer
from attnlab.core.tokens import Tokens, pack, unpack

if TYPE_CHECKING:
    from attnlab.checking import check
    from attnlab.modifiers import apply_modifier, list_modifiers, modifier_info
    from attnlab.ops.backends import explain_backend, use_backend
    from attnlab.reducers import create_reducer, list_reducers, reducer_info

__version__ = "0.1.0"

_LAZY = {
    "apply_modifier": "attnlab.modifiers",
    "check": "attnlab.checking",
    "create_reducer": "attnlab.reducers",
    "explain_backend": "attnlab.ops.backends",
    "list_modifiers": "attnlab.modifiers",
    "list_reducers": "attnlab.reducers",
    "modifier_info": "attnlab.modifiers",
    "reducer_info": "attnlab.reducers",
    "use_backend": "attnlab.ops.backends",
}

__all__ = [
    "AttnlabError",
    "BackendUnavailableError",
    "Before",
    "Dynamics",
    "Info",
    "Mixer",
    "MixerInfo",
    "Registry",
    "State",
    "StreamingMixer",
    "Supports",
    "Tokens",
    "UnknownNameError",
    "UnsupportedError",
    "apply_modifier",
    "check",
    "create_mixer",
    "create_reducer",
    "explain_backend",
    "list_mixers",
    "list_modifiers",
    "list_reducers",
    "mixer_info",
    "modifier_info",
    "pack",
    "record",
    "reducer_info",
    "unpack",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Names that cost an import are loaded when first used."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'attnlab' has no attribute {name!r}")
