"""Objectives: losses and regularisers on what mixers hand to `attnlab.record`; `list_objectives` names them."""

from __future__ import annotations

from attnlab.objectives.contract import Objective
from attnlab.objectives.registry import create_objective, list_objectives, objective_info, objectives

__all__ = ["Objective", "create_objective", "list_objectives", "objective_info", "objectives"]
