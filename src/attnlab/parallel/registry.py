"""The registry of ways to spread a mixer over several devices or processes."""

from __future__ import annotations

from torch import nn

from attnlab.core.registry import Registry

parallelisms: Registry[nn.Module] = Registry("parallelism", "attnlab.parallel")
