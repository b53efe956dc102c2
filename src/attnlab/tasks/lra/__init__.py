"""Long Range Arena (Tay et al. 2020): its generators, its tasks, and what was published about them."""

from __future__ import annotations
