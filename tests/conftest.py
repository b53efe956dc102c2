"""Set-up of every test run: threads, seeds, typed imports, and the plugins in ``tests/plugins``."""

from __future__ import annotations

import os
import random

from plugins import typecheck

os.environ.setdefault(
    "GOMP_SPINCOUNT", "20000"
)  # read when torch loads OpenMP: spinning teams starve each other on a busy machine
typecheck.install()

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

pytest_plugins = ("pytester", "plugins.tiers", "plugins.skips")

hypothesis.settings.register_profile("attnlab", deadline=None, derandomize=True)
hypothesis.settings.load_profile("attnlab")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Fixtures of any scope draw the same numbers whichever test asks for them first."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """A test draws the same numbers alone and in company."""
    _seed()
