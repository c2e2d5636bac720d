"""Training that starts from a file's LoRA."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.lora.attach import check_trains, load_lora
from finetune.lora.reading import read_lora
from finetune.lora.targets import match_targets, places_in, reached
from finetune.lora.update import Updates, split_updates
from sdkit.checks import expect
from sdkit.errors import ConfigError
from sdkit.files import new_folder, replacing

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel


def continue_lora(
    sd: DiffusionModel,
    path: str | Path,
    rank: int | None = None,
    alpha: float | None = None,
    targets: str | Sequence[str] | None = None,
    dropout: float = 0.0,
    use_dora: bool = False,
    text_encoder: bool = False,
    unet: bool = True,
    clip_skip: int = 0,
) -> None:
    """Put a file's LoRA into the model as "default", to go on training; the model's own parameters are frozen.

    Ranks, alphas and places are the file's. The arguments, as in `add_lora`, say what it is expected to be; None: what
    it is. Raises ConfigError that names the first that it is not, CheckpointError for a file that cannot be read.
    """
    found, changes = split_updates(read_lora(path, places_in(sd)))
    check_trains(path, found, changes)
    _check_sizes(found, path, rank, alpha, use_dora)

    networks = {"unet": unet, "text_encoder": text_encoder}
    for name, wanted in networks.items():
        there = any(target.network == name for target in found)
        if there != wanted:
            has = "has modules of" if there else "lacks modules of"
            how = {"unet": "learning_rate", "text_encoder": "train_text_encoder"}[name]
            raise ConfigError(f"{how}: expected to train what {path} is for; it {has} the {name}")

    places = [target for target in places_in(sd) if len(target.shape) > 1 and networks[target.network]]
    places = reached(places, sd.text_encoder.config.num_hidden_layers, clip_skip)
    if beyond := [target for target in found if target not in set(places)]:
        raise ConfigError(f"clip_skip: {path} has {beyond[0].diffusers}, which {clip_skip} leaves out")
    if targets is not None and (odd := set(found) ^ set(match_targets(places, targets))):
        first = min(odd, key=lambda target: target.diffusers)
        has = "has" if first in found else "lacks"
        raise ConfigError(f"targets: expected those of {path}, which {has} {first.diffusers}, or none to follow it")

    load_lora(sd, path, name="default", trainable=True, dropout=dropout)


def _check_sizes(found: Updates, path: str | Path, rank: int | None, alpha: float | None, use_dora: bool) -> None:
    ranks = sorted({update.rank for update in found.values()})
    alphas = sorted({update.scale * update.rank for update in found.values()})
    if rank is not None:
        expect(ranks == [rank], "rank", f"that of {path}, {_listed(ranks)}, or none to follow it", rank)
    if alpha is not None:
        same = all(math.isclose(own, alpha) for own in alphas)
        expect(same, "alpha", f"that of {path}, {_listed(alphas)}, or none to follow it", alpha)
    if use_dora and any(update.magnitude is None for update in found.values()):
        raise ConfigError(f"use_dora: expected DoRA in {path}, found LoRA")


def keep_copy(path: Path, folder: Path) -> None:
    """Copy a LoRA's file or folder into ``folder``, as `copy_in`, so that a run that is resumed does not need it."""
    copy = copy_in(path, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        with new_folder(copy) as temporary:
            shutil.copytree(path, temporary, dirs_exist_ok=True)
    else:
        with replacing(copy) as temporary:
            shutil.copyfile(path, temporary)


def copy_in(path: Path, folder: Path) -> Path:
    """Where `keep_copy` puts a file; its ending, which readers go by, stays."""
    return folder / f"init_lora{path.suffix}"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
