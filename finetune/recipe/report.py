"""A run's account of itself: a summary before it starts, and files that show how it went."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import nn

from finetune.data.batches import TrainingData
from finetune.data.describing import UNUSED, describe, every_unused
from finetune.data.folders import Picture
from finetune.training.config import TrainConfig
from finetune.training.history import History
from finetune.training.loop import Trained
from finetune.training.memory import Memory, size
from finetune.training.states import saved_states
from sdkit.files import new_folder, replacing, write_text
from sdkit.images.pixels import open_image
from sdkit.images.sheet import contact_sheet, enlarged, stacked

SIDE = 128  # pixels that a picture has on a sheet, at least
SHOWN = 8  # pictures that were learnt from
OVERVIEW, REPORT = "overview.png", "report.md"


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


def report(
    output: Path,
    about: str,
    history: History,
    seconds: float,
    peak: int,
    files: Sequence[str],
    learnt_from: Sequence[Picture] = (),
) -> None:
    """Copy ``files`` from the newest checkpoint; beside them write the losses, their curve, report.md, and, where there
    are sample sheets, overview.png: some of the pictures ``learnt_from``, and the sheets before and after."""
    for file in files:
        newest = saved_states(output)[-1] / file
        if newest.is_dir():
            with new_folder(output / file) as temporary:
                shutil.copytree(newest, temporary, dirs_exist_ok=True)
        else:
            with replacing(output / file) as temporary:
                shutil.copyfile(newest, temporary)

    history.write_csv(output / "losses.csv")
    history.draw(output / "loss.png")

    tenth = max(1, len(history.rows) // 10)
    first = sum(row.loss for row in history.rows[:tenth]) / tenth

    sheets = sorted((output / "samples").glob("step-*.png"))
    if sheets:
        with replacing(output / OVERVIEW) as temporary:
            overview(learnt_from, sheets[0], sheets[-1]).save(temporary, "PNG")
    parts = [
        f"# {output.name}",
        f"```\n{about}\n```",
        f"Mean loss of the first {tenth} steps {first:.4f}, of the last {history.recent(tenth):.4f}. "
        f"{seconds:.0f} s in the last session, at most {size(peak)} of memory. "
        f"Written: {', '.join(f'`{file}`' for file in files)}.",
        "![The loss curve](loss.png)",
        *([f"![Learnt from, before, after]({OVERVIEW})"] if sheets else []),
    ]

    write_text(output / REPORT, "\n\n".join(parts) + "\n")
    print(f"{output / files[0]} written; see {output / REPORT}")


def was_finished(output: Path, trained: Trained, files: Sequence[str]) -> bool:
    """Whether a run was at its end before this session, and all is written; then says so, for nothing is to change."""
    finished = trained.steps == 0 and all((output / name).exists() for name in (*files, REPORT))
    if finished:
        steps = len(trained.history.rows)
        print(
            f"{output}: finished before, after {steps} steps, and nothing is changed; "
            "a larger --max-train-steps trains on, --no-resume begins anew"
        )
    return finished


def overview(learnt_from: Sequence[Picture], before: Path, after: Path) -> Image.Image:
    """Some of the pictures that were learnt from, and the sample sheets before and after, one above the other."""
    parts = {"Before": open_image(before).convert("RGB"), "After": open_image(after).convert("RGB")}
    if learnt_from:
        some = learnt_from[:SHOWN]
        pictures = [enlarged(open_image(picture.path).convert("RGB"), SIDE) for picture in some]
        for picture in pictures:
            picture.thumbnail((2 * SIDE, 2 * SIDE))
        parts = {"Learnt from": contact_sheet(pictures, 4, [picture.caption for picture in some])} | parts
    return stacked(list(parts.values()), list(parts))
