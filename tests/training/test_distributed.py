"""Training in pieces and in several processes is training in one: the same curve, and resumed bit-equal after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from attnlab.tasks import create_task, reference_model
from attnlab.tasks.contract import Batch
from attnlab.training import train
from attnlab.training.checkpoint import load
from attnlab.training.distributed import Processes, cut, targets_in

pytest.importorskip("accelerate")
WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "20000"}


def start(out, checkpoint="-", processes=1, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(WORKER), str(out), str(checkpoint), *(f"{k}={v}" for k, v in options.items())]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process, out, rank=0):
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told
    return json.loads(Path(f"{out}.{rank}.json").read_text()), torch.load(f"{out}.{rank}.pt")


def run(out, checkpoint="-", processes=1, **options):
    return finish(start(out, checkpoint, processes, **options), out)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float64", 1e-12)])
def test_pieces_and_processes_follow_the_curve_of_one(tmp_path, dtype, bound):
    # float32 rounds each run its own way, and training carries that on: a few steps of it, all of float64.
    options = {"dtype": dtype, "steps": 6 if dtype == "float32" else 24, "learning_rate": 1e-3}
    whole, _ = run(tmp_path / "one", **options)
    pieces, _ = run(tmp_path / "pieces", accumulate=4, **options)
    process = start(tmp_path / "two", processes=2, **options)
    two, weights = finish(process, tmp_path / "two")
    other = json.loads((tmp_path / "two.1.json").read_text())
    both = torch.load(tmp_path / "two.1.pt")
    assert other == two and equal(both, weights), "ranks agree in every bit"
    for found in (pieces, two):
        assert found["losses"] == pytest.approx(whole["losses"], rel=bound)
        assert found["norms"] == pytest.approx(whole["norms"], rel=10 * bound)
        assert found["metrics"] == pytest.approx(whole["metrics"], rel=100 * bound)


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_a_killed_run_resumes_bit_equal(tmp_path, processes, accumulate):
    options = {"processes": processes, "accumulate": accumulate, "drop": 0.3}  # chance, which must go on where it was
    expected, weights = run(tmp_path / "whole", **options)
    checkpoint = tmp_path / "run.safetensors"
    process = start(tmp_path / "killed", checkpoint, checkpoint_every=5, slow=0.05, **options)
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    own = psutil.Process(process.pid)
    for one in [*own.children(recursive=True), own]:  # torchrun's workers are in groups of their own
        one.kill()
    process.communicate()
    assert load(checkpoint)[1]["progress"]["step"] < 24 and not (tmp_path / "killed.0.json").exists()
    found, resumed = run(tmp_path / "resumed", checkpoint, **options)
    assert equal(resumed, weights) and found == expected


def test_bfloat16_runs(tmp_path):
    found, weights = run(tmp_path / "half", processes=2, autocast="bfloat16", accumulate=2)
    assert found["status"] == "finished" and found["losses"][-1] < found["losses"][0]
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"],
    ],
)
def test_the_command_under_launchers(tmp_path, launcher):
    arguments = "-m attnlab train recall linear --steps 4 --batch-size 8 --log-every 2 --json --parameters 6000 --depth 1"
    sizes = "--task-option seq_len=16 --task-option num_pairs=2 --task-option vocab_size=12"
    checkpoint = ["--checkpoint", str(tmp_path / "run.safetensors")]
    command = [sys.executable, "-m", *launcher, *arguments.split(), *sizes.split(), *checkpoint]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["status"] == "finished" and [step for step, _ in found["curve"]] == [2, 4]
    assert load(checkpoint[1])[1]["run"]["processes"] == 2


def test_a_batch_is_cut_evenly_and_targets_are_counted():
    batch = Batch(torch.arange(14).reshape(7, 2), torch.tensor([[1, -100]] * 7))
    pieces = cut(batch, 3)
    assert [len(piece) for piece in pieces] == [2, 2, 3]
    assert torch.equal(torch.cat([piece.inputs for piece in pieces]), batch.inputs)
    assert targets_in(batch) == 7
    assert targets_in(Batch(batch.inputs, torch.tensor([[[1.0], [float("nan")]]] * 7))) == 7


def test_what_cannot_be_is_refused():
    task = create_task("recall", seq_len=16, num_pairs=2, vocab_size=16, eval_examples=20)
    model = reference_model(task, "linear", dim=8, depth=1).model
    with pytest.raises(ValueError, match="accumulate: expected 1 to batch_size=4, got 5"):
        train(model, task, steps=1, batch_size=4, learning_rate=0.1, accumulate=5)

    class Scaled:
        process_index, num_processes, mixed_precision = 0, 1, "fp16"

    with pytest.raises(ValueError, match=r"expected mixed_precision to be one of .* got 'fp16'"):
        Processes(Scaled())
