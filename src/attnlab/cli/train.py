"""``attnlab train``: one model on one task, in one process or several."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from attnlab.cli.console import print_json

if TYPE_CHECKING:
    from attnlab.training import TrainResult

PRECISIONS = ("float32", "bfloat16")


def train(
    task: Annotated[str, typer.Argument(help="A registered task.")],
    mixer: Annotated[str, typer.Argument(help="A registered mixer.")],
    steps: Annotated[int | None, typer.Option(help="Optimiser steps [default: the task's].", show_default=False)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples a step, of all processes together [default: the task's].", show_default=False)
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Pieces in which a process runs its examples of a step.")] = 1,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate [default: the middle of the task's].", show_default=False)
    ] = None,
    parameters: Annotated[int | None, typer.Option(help="Size of the model [default: the task's].", show_default=False)] = None,
    depth: Annotated[int | None, typer.Option(help="Blocks [default: the task's].", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of parameters and batches.")] = 0,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 for mixed precision.")] = "float32",
    checkpoint: Annotated[
        str | None, typer.Option(help="A .safetensors file; if it is there, training goes on from it.", show_default=False)
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints [default: a tenth of all].", show_default=False)
    ] = None,
    log_every: Annotated[int, typer.Option(help="Steps between lines.")] = 20,
    task_option: Annotated[
        list[str] | None, typer.Option("--task-option", help="NAME=VALUE, any number of times.", show_default=False)
    ] = None,
    mixer_option: Annotated[
        list[str] | None, typer.Option("--mixer-option", help="NAME=VALUE, any number of times.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Train the reference model of a task, in which only the mixer is chosen, and evaluate it.

    Under torchrun or accelerate launch the processes split each batch (extra: attnlab[accelerate]); the loss is that of one.
    With --checkpoint, the same command goes on where it was killed.

    Examples: attnlab train recall delta_net --steps 500 --checkpoint runs/recall.safetensors;
    torchrun --nproc-per-node 2 -m attnlab train recall delta_net;
    accelerate launch --multi_gpu --num_processes 2 -m attnlab train recall delta_net --precision bfloat16 --accumulate 4

    Exit code 0: trained; 1: the loss was not finite; 2: bad usage.
    """
    sizes = {"parameters": parameters, "depth": depth, "seed": seed, "mixer_options": options(mixer_option)}
    recipe = {"steps": steps, "batch_size": batch_size, "learning_rate": lr, "accumulate": accumulate}
    files = {"checkpoint": checkpoint, "checkpoint_every": checkpoint_every, "log_every": log_every}
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"--precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    status = work(task, options(task_option), mixer, sizes, {**recipe, **files}, precision, as_json)
    if status == "diverged":
        raise typer.Exit(1)


def work(
    task: str,
    task_options: Mapping[str, Any],
    mixer: str,
    sizes: Mapping[str, Any],
    given: Mapping[str, Any],
    precision: str,
    as_json: bool,
) -> str:
    """Build, train and report; ``given`` are arguments of `attnlab.training.train`, None where the task's budget decides."""
    import torch

    from attnlab.tasks import create_task, reference_model
    from attnlab.training import train as run

    chosen = create_task(task, **task_options)
    budget, accelerator = chosen.default_budget, launched()
    built = reference_model(chosen, mixer, **sizes)
    rate = budget.learning_rates[len(budget.learning_rates) // 2]
    usual = {"steps": budget.steps, "batch_size": budget.batch_size, "learning_rate": rate}
    chosen_values: dict[str, Any] = {name: usual.get(name) if value is None else value for name, value in given.items()}
    if given["checkpoint_every"] is None:
        chosen_values["checkpoint_every"] = max(1, chosen_values["steps"] // 10)
    main = accelerator is None or accelerator.is_main_process
    screen = Console(stderr=True, highlight=False, quiet=not main)
    screen.print(f"{mixer} on {task}: {built.parameters} parameters, {chosen_values['steps']} steps", markup=False)
    found = run(
        cast(torch.nn.Module, built.model),
        chosen,
        weight_decay=budget.weight_decay,
        warmup=budget.warmup,
        seed=sizes["seed"],
        autocast=torch.bfloat16 if precision == "bfloat16" else None,
        callback=lambda row: screen.print(f"step {row.step}: loss {row.loss:.4f}, {row.seconds:.1f} s", markup=False),
        accelerator=accelerator,
        **chosen_values,
    )
    if main:
        show(found, built.parameters, as_json)
    if accelerator is not None:
        accelerator.end_training()
    return found.status


def show(found: TrainResult, parameters: int, as_json: bool) -> None:
    """Print what came of it."""
    outcome = {"status": found.status, "steps": found.steps, "seconds": found.seconds, "metrics": found.metrics}
    if as_json:
        print_json({**outcome, "curve": [[row.step, row.loss] for row in found.history], "parameters": parameters})
        return
    told = ", ".join(f"{name} {value:.4f}" for name, value in found.metrics.items())
    print(f"{found.status} after {found.steps} steps, {found.seconds:.1f} s: {told}")


def launched() -> Any:
    """The accelerator of the processes that a launcher has started; None without one."""
    if not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):
        return None
    import torch

    from attnlab.training.distributed import make_accelerator

    return make_accelerator(cpu=not torch.cuda.is_available())


def options(given: Sequence[str] | None) -> dict[str, Any]:
    """``NAME=VALUE`` texts as a mapping; values are JSON where they can be, else texts."""
    import json

    found: dict[str, Any] = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not (name and sign):
            raise typer.BadParameter(f"expected NAME=VALUE, got {text!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
