"""Sequence parallelism between real processes: torchrun starts ``worker.py``, whose cases compare with one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnlab import create_mixer
from attnlab.parallel import gather, parallelize, reduce_gradients, sequence_parallel, split, start

WORKER = Path(__file__).with_name("worker.py")
EQUAL = ("every_mixer", "a_hybrid_model")
SHORT = ("bytes_of_linear_layers_do_not_grow", "ranks_without_loss_or_gradient_do_not_hang", "mistakes_are_errors_on_every_rank")


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(2, (*EQUAL, *SHORT)), (4, EQUAL), pytest.param(3, (*EQUAL, *SHORT), marks=pytest.mark.slow)],
)
def test_ranks_together_are_one_process(ranks, cases) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(WORKER), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "20000"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = {line for line in run.stdout.splitlines() if " passed " in line}
    assert passed == {f"rank {rank} passed {case}" for rank in range(ranks) for case in cases}


def test_without_processes_it_is_said_how_to_start_them(monkeypatch) -> None:
    mixer = create_mixer("linear", 8, num_heads=2, causal=True)
    x = mixer.q_proj.weight[None]
    calls = [
        lambda: sequence_parallel(mixer),
        lambda: parallelize(mixer),
        lambda: split(x),
        lambda: gather(x),
        lambda: reduce_gradients(mixer),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"expected an initialised process group, got none; .*torchrun --nproc-per-node"):
            call()
    assert "forward" not in vars(mixer)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match=r"expected to run under torchrun, got no RANK.*torchrun --nproc-per-node"):
        start("gloo")
    with pytest.raises(ValueError, match="timeout: expected a positive number of seconds, got 0"):
        start("gloo", timeout=0)
