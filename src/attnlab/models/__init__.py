"""Models that take any registered mixer; `list_models` names them."""

from __future__ import annotations

from attnlab.models.block import Block
from attnlab.models.budget import Matched, count_parameters, match_budget
from attnlab.models.encoder import EncoderClassifier
from attnlab.models.language import CausalLM
from attnlab.models.norms import create_norm
from attnlab.models.registry import create_model, list_models, model_info, models
from attnlab.models.residual import Residual
from attnlab.models.schedules import create_schedule, list_schedules, schedule_info, schedules
from attnlab.models.search_space import Candidate, LayerChoice, SearchSpace
from attnlab.models.search_spaces import create_search_space, search_spaces

__all__ = [
    "Block",
    "Candidate",
    "CausalLM",
    "EncoderClassifier",
    "LayerChoice",
    "Matched",
    "Residual",
    "SearchSpace",
    "count_parameters",
    "create_model",
    "create_norm",
    "create_schedule",
    "create_search_space",
    "list_models",
    "list_schedules",
    "match_budget",
    "model_info",
    "models",
    "schedule_info",
    "schedules",
    "search_spaces",
]
