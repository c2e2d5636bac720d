"""The training loop: any module from a batch to its loss, on one process or many, resumable to the bit.

Nothing random is carried from step to step: batch ``n`` and the dropout of micro-batch ``n`` follow from the seed and
``n``. So a run's state is its trained weights, optimizer, moving average, gradient scaler and the number of steps done.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from finetune.seeds import seed_of
from finetune.training.averaging import MovingAverage
from finetune.training.config import TrainConfig
from finetune.training.facts import Facts
from finetune.training.history import Board, History
from finetune.training.memory import peak_memory, size
from finetune.training.output_lock import output_lock
from finetune.training.run_state import RunState
from finetune.training.stopping import StopRequest, TrainingStopped
from sdkit.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

SHEETS = "samples/step-{step:06d}.png"


def make_accelerator(config: TrainConfig, cpu: bool = False) -> Accelerator:
    """The device and processes that ``accelerate launch`` (or nothing) gives us; under ``cpu`` no other device.

    accelerate keeps the choice for the rest of the process; see `on_the_cpu`. Raises ConfigError.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=cpu)
    if accelerator.num_processes == 1 and _several_were_asked_for(os.environ):
        raise ConfigError(
            "accelerate launch: told of several processes, it has started one, as it does on a CPU without MPI; "
            "ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m … starts them"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("mixed_precision: fp16 needs a GPU; expected no or bf16 on a CPU")

    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
    if (found := accelerator.distributed_type) not in known:
        raise ConfigError(f"accelerate: expected no, multi-CPU, multi-GPU or FSDP, found {found}")
    if found == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("accelerate: expected fsdp_version 2, found 1")
    return accelerator


def _several_were_asked_for(environment: Mapping[str, str]) -> bool:
    """Whether ``accelerate launch`` has named a port where processes meet, and no rank: it has started one alone."""
    launched = {"ACCELERATE_USE_CPU", "ACCELERATE_DYNAMO_BACKEND", "MASTER_PORT"} <= environment.keys()
    return launched and "RANK" not in environment


@contextmanager
def on_the_cpu(config: TrainConfig) -> Generator[Accelerator]:
    """An accelerator on the CPU, whatever the machine has and whatever this process has chosen before.

    accelerate keeps one choice for a process, in class attributes; after the block they are what they were before it.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kinds: Any = (PartialState, AcceleratorState, GradientState)
    before = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._shared_state.clear()

    try:
        yield make_accelerator(config, cpu=True)
    finally:
        for kind, values in zip(kinds, before, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(values)


@dataclass(frozen=True)
class Trained:
    """The end of a run: the losses of all its steps, the weights' moving average if the settings ask for one, and how
    many steps were done in this session; 0 where the run was at its end before."""

    history: History
    average: MovingAverage | None
    steps: int


def train(
    accelerator: Accelerator,
    loss: nn.Module,
    batches: Callable[[int], Any],
    config: TrainConfig,
    output: Path,
    *,
    facts: Facts | None = None,
    begin: Callable[[], None] = lambda: None,
    highest_rate: Callable[[str], float] | None = None,
    export: Callable[[Path], None] | None = None,
    validate: Callable[[], Image.Image] | None = None,
    sheets: str = SHEETS,
) -> Trained:
    """Train the parameters of ``loss`` that require a gradient.

    loss: loss(batch) is the mean loss of a batch, a scalar. Trained parameters must be float32.
    batches: batches(n) is this process's share of micro-batch n, for any n, always the same; it is called in a thread,
        one batch ahead.
    output: gets ``checkpoint-STEP`` folders, sheets and ``tensorboard``. A run that finds a checkpoint goes on from
        there, bit for bit as if it had never stopped (on one or two processes, with deterministic kernels).
    facts: what else the course of the run depends on, such as the pictures (`finetune.training.facts`); a state with
        others is refused by the names of what has changed.
    begin(): called on the main process as soon as no other run can write into ``output``.
    highest_rate: the highest learning rate of the parameter of that name, above 0; the settings' by default.
    export(folder): writes the trained weights (their moving average, if there is one) for use; called on the main
        process for every checkpoint.
    validate(): a sample sheet, drawn with these weights, also on the main process; before, on the way and after.
    sheets: the sheets' path below ``output``, made by ``str.format`` from ``step``.

    Gradients of several processes are averaged: with the same global batch the run is that of one process, up to
    rounding. Ctrl-C and SIGTERM let the step in hand end, save a state and raise TrainingStopped. Raises ConfigError,
    CheckpointError for a state of another run, NumericalError when a loss, a gradient or a weight is not finite; then
    no state is written that holds it.
    """
    if validate is not None and accelerator.is_fsdp2:
        raise ConfigError("training: no sample sheets under FSDP, where no process has all weights; leave them out")

    with output_lock(output) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            begin()
        run = RunState(accelerator, loss, config, output, facts or {}, highest_rate, export)
        return _train(run, batches, validate, sheets)


def _train(
    run: RunState, batches: Callable[[int], Any], validate: Callable[[], Image.Image] | None, sheets: str
) -> Trained:
    accelerator, config = run.accelerator, run.config
    run.resume()
    first = run.step
    with (
        closing(_one_ahead(batches, run.step * config.gradient_accumulation_steps)) as micro_batches,
        Board(run.output, sheets, config.report_to, run.step, accelerator.is_main_process) as board,
        StopRequest(accelerator) as stop,
    ):
        signal = _go_on(run, micro_batches, board, validate, stop)

    if signal:
        if accelerator.is_main_process:
            print(_how_to_resume(run, signal), file=sys.stderr, flush=True)
        raise TrainingStopped(signal)

    accelerator.wait_for_everyone()
    return Trained(run.history, run.average, run.step - first)


def _go_on(
    run: RunState,
    micro_batches: Iterator[tuple[int, Any]],
    board: Board,
    validate: Callable[[], Image.Image] | None,
    stop: StopRequest,
) -> int:
    """All the steps that are left, with a progress bar and all that is written on the way.

    Returns the signal after which it has stopped, 0 for none.
    """
    config, accelerator = run.config, run.accelerator
    started, first = time.monotonic(), run.step
    with tqdm(
        initial=first, total=config.max_train_steps, desc="train", disable=not accelerator.is_main_process
    ) as bar:
        if validate is not None and first == 0:
            board.sheet(0, run.show(validate))

        while run.step < config.max_train_steps:
            _step(run, micro_batches)
            bar.update()

            signal = stop.number()
            if signal or run.due(config.logging_steps) or run.due(config.checkpointing_steps):
                board.losses(run.history.collect(accelerator))
                speed = (run.step - first) / (time.monotonic() - started)
                memory = size(peak_memory(accelerator.device))
                bar.set_postfix_str(f"loss {run.history.recent():.4f}, {speed:.2f} steps/s, {memory}")
            if validate is not None and run.due(config.validation_steps or config.max_train_steps):
                board.sheet(run.step, run.show(validate))
            if signal or run.due(config.checkpointing_steps):
                run.save()
            if signal:
                return signal
    return 0


def _how_to_resume(run: RunState, number: int) -> str:
    """A line for the user who has stopped the run by this signal."""
    done = f"stopped by {Signals(number).name} after step {run.step} of {run.config.max_train_steps}"
    again = "the same command" if run.config.resume else "the same command with --resume in place of --no-resume"
    return f"{done}, saved in {run.output / f'checkpoint-{run.step}'}: {again} goes on from there"


def _step(run: RunState, micro_batches: Iterator[tuple[int, Any]]) -> None:
    """One optimizer step; its loss goes into the history."""
    config, accelerator = run.config, run.accelerator
    rate, total = run.set_rate(), torch.zeros((), device=accelerator.device)

    for part in range(config.gradient_accumulation_steps):
        n, batch = next(micro_batches)
        torch.manual_seed(seed_of("dropout", config.seed, n, accelerator.process_index))
        last = part + 1 == config.gradient_accumulation_steps
        with nullcontext() if last else accelerator.no_sync(run.module):
            value = run.module(batch) / config.gradient_accumulation_steps
            accelerator.backward(value)
        total += value.detach()

    norm = run.update()
    run.history.add(run.step, total, norm, rate)


def _one_ahead(batches: Callable[[int], Any], first: int) -> Generator[tuple[int, Any]]:
    """(n, batches(n)) from n = first on; each is made in a thread while the one before it is in use.

    In that thread context variables, such as the backend of `sdkernels`, have the values that they have here.
    """
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(copy_context().run, batches, first)
        for n in count(first):
            batch, ahead = ahead.result(), pool.submit(copy_context().run, batches, n + 1)
            yield n, batch
