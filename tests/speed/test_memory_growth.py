"""The memory of sparse mechanisms grows no faster than they declare: ``pytest -m speed``, three sizes, a fresh process each.

    python tests/speed/test_memory_growth.py [NAME ...]

prints the table without asserting anything.
"""

from __future__ import annotations

import math
import sys
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest

from attnlab import list_mixers, mixer_info
from attnlab.core.info import MixerInfo
from speed.timing import peak_bytes

pytestmark = pytest.mark.speed
FAMILIES = ("local", "partitioned", "sparse")
ALLOWANCE = 0.15
"""What an exponent may be above the declared one: memory is handed out in blocks, which fit some sizes better than others."""
LOGARITHM = {("hyper_attention", True): "halves recursively, and each level keeps what backward needs: n log n"}
"""Forms with a factor log n, which an exponent does not say."""
LOGARITHMIC = 0.5
"""What that factor may look like at these sizes, from one level of the recursion to four."""
SIZES = ((1.0, (6400, 14400, 36864)), (1.5, (4096, 9216, 25600)), (2.0, (2048, 4096, 8192)), (math.inf, (512, 1024, 2048)))
"""Tokens by the declared exponent: squares, so that grids have equal sides, and more than any default window or block."""

WORK = """
import sys; sys.path.insert(0, "tests")
from attnlab.compare.layers import Layer, build_layer, random_input
from speed.timing import forward_and_backward
def ready(n):
    layer = Layer({name!r}, {causal}, 64, 4, options={{"max_len": n}} if {limited} else {{}})
    mixer, (x, grid) = build_layer(layer, n), random_input(layer, n)
    return forward_and_backward(lambda x: mixer(x, grid=grid), x)
ready(400)()  # loads what is loaded at first use
run = ready({tokens})
"""


class Growth(NamedTuple):
    """Peak bytes beyond layer and tokens at each number of tokens, forward and backward."""

    sizes: dict[int, int]

    @property
    def fitted(self) -> float:
        """Exponent of n over all sizes, least squares in logarithms."""
        return float(np.polyfit(np.log(list(self.sizes)), np.log(list(self.sizes.values())), 1)[0])

    @property
    def last(self) -> float:
        """Exponent between the two largest sizes, where what does not grow hides least."""
        (n, small), (m, large) = list(self.sizes.items())[-2:]
        return math.log(large / small) / math.log(m / n)

    def __str__(self) -> str:
        sizes = ", ".join(f"{n}: {size / 2**20:.0f} MiB" for n, size in self.sizes.items())
        return f"n^{self.fitted:.2f}, at last n^{self.last:.2f} ({sizes})"


def lengths(info: MixerInfo) -> tuple[int, ...]:
    """Three sizes that suit what the mixer declares."""
    return next(sizes for cost, sizes in SIZES if info.supports.cost <= cost)


def measure(name: str, causal: bool) -> Growth:
    info = mixer_info(name)
    limited = any(option.name == "max_len" for option in info.options)
    setups = {n: WORK.format(name=name, causal=causal, tokens=n, limited=limited) for n in lengths(info)}
    return Growth({n: peak_bytes(setup, "run()") for n, setup in setups.items()})


def forms() -> list[tuple[str, bool]]:
    """Every mixer of the families in each form that it has."""
    wanted = {"no": (False,), "optional": (False, True), "always": (True,)}
    names = [name for family in FAMILIES for name in list_mixers(family=family)]
    return [pair for name in names for pair in product([name], wanted[mixer_info(name).supports.causal])]


def said(name: str, causal: bool, growth: Growth) -> str:
    return f"{name}{', causal' if causal else ''}: declared n^{mixer_info(name).supports.cost:g}, {growth}"


@pytest.mark.parametrize(("name", "causal"), forms())
def test_memory_grows_no_faster_than_declared(name, causal) -> None:
    growth = measure(name, causal)
    print(said(name, causal, growth))
    allowance = LOGARITHMIC if (name, causal) in LOGARITHM else ALLOWANCE
    assert max(growth.fitted, growth.last) <= mixer_info(name).supports.cost + allowance


if __name__ == "__main__":
    for name, causal in forms():
        if name in sys.argv[1:] or not sys.argv[1:]:
            print(said(name, causal, measure(name, causal)), flush=True)
