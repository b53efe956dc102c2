"""Sequence parallelism: the tokens of a sequence on several processes, which exchange summaries of their pieces."""

from __future__ import annotations

from attnlab.parallel.gradients import reduce_gradients
from attnlab.parallel.mixer import SequenceParallel, sequence_parallel
from attnlab.parallel.model import parallelize, restore
from attnlab.parallel.processes import start
from attnlab.parallel.ranks import Sent, Traffic
from attnlab.parallel.registry import create_parallelism, list_parallelisms, parallelism_info, parallelisms
from attnlab.parallel.shards import gather, split
from attnlab.parallel.simulate import simulate

__all__ = [
    "Sent",
    "SequenceParallel",
    "Traffic",
    "create_parallelism",
    "gather",
    "list_parallelisms",
    "parallelism_info",
    "parallelisms",
    "parallelize",
    "reduce_gradients",
    "restore",
    "sequence_parallel",
    "simulate",
    "split",
    "start",
]
