"""A run's account of itself: a summary before it starts, and files that show how it went."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from finetune.data.batches import TrainingData
from finetune.data.describing import UNUSED, describe, every_unused
from finetune.training.config import TrainConfig
from finetune.training.history import History
from finetune.training.memory import Memory, size
from finetune.training.states import saved_states
from sdkit.files import write_text


def summary(
    about: Mapping[str, str],
    trained: Sequence[nn.Parameter],
    data: TrainingData,
    config: TrainConfig,
    memory: Memory,
    output: Path,
    world: int,
) -> str:
    """The text shown before a run starts: the lines ``about``, then parameters, pictures, steps and memory."""
    each = data.config.train_batch_size * config.gradient_accumulation_steps * world
    epochs = config.max_train_steps * config.gradient_accumulation_steps / data.batches_per_epoch

    lines = {
        **about,
        "trained": f"{sum(p.numel() for p in trained):,} parameters in {len(trained)} tensors",
        **describe(data),
        "steps": f"{config.max_train_steps} of {each} pictures, {epochs:.1f} epochs, {world} process(es)",
        "memory": f"about {memory} a process",
        "output": str(output),
    }
    shown = {name: value.replace("\n", "\n" + " " * 10) for name, value in lines.items()}
    return "\n".join(f"{name:<9} {value}" for name, value in shown.items())


def write_beginnings(output: Path, options: str, data: TrainingData) -> None:
    """Write what stands before the first step: ``options``, the TOML file that makes the run again, and what of the
    data is not used."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "config.toml", options)
    (output / UNUSED).unlink(missing_ok=True)
    if data.left_out:
        write_text(output / UNUSED, every_unused(data))


def report(output: Path, about: str, history: History, seconds: float, peak: int, files: Sequence[str]) -> None:
    """Copy ``files`` from the newest checkpoint; beside them write the losses, their curve and report.md."""
    for file in files:
        newest = saved_states(output)[-1] / file
        if newest.is_dir():
            shutil.copytree(newest, output / file, dirs_exist_ok=True)
        else:
            shutil.copyfile(newest, output / file)

    history.write_csv(output / "losses.csv")
    history.draw(output / "loss.png")

    tenth = max(1, len(history.rows) // 10)
    first = sum(row.loss for row in history.rows[:tenth]) / tenth

    sheets = sorted((output / "samples").glob("step-*.png"))
    shown = [("Before", sheets[0]), ("After", sheets[-1])] if sheets else []
    parts = [
        f"# {output.name}",
        f"```\n{about}\n```",
        f"Mean loss of the first {tenth} steps {first:.4f}, of the last {history.recent(tenth):.4f}. "
        f"{seconds:.0f} s in the last session, at most {size(peak)} of memory. "
        f"Written: {', '.join(f'`{file}`' for file in files)}.",
        "![The loss curve](loss.png)",
        *(f"## {title}\n\n![Sample sheet](samples/{sheet.name})" for title, sheet in shown),
    ]

    write_text(output / "report.md", "\n\n".join(parts) + "\n")
    print(f"{output / files[0]} written; see {output / 'report.md'}")
