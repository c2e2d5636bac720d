"""What of a call is refused before its model is loaded: by the model's configuration, without a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sdkit.checkpoints.companion_folder import base_of
from sdkit.checkpoints.loading import find_model
from sdkit.checkpoints.scheduler_config import read_scheduler_config
from sdkit.errors import ConfigError, SDKitError
from sdkit.files import read_config
from sdkit.generation.options import Settings, TaskKind, read_settings
from sdkit.generation.tasks import read_hires
from sdkit.images.pixels import check_size
from sdkit.networks.config import VAEConfig
from sdkit.sampling.planning import make_plan, plan_arguments
from sdkit.sampling.schedule import NoiseSchedule

HIRES = ("hires_scale", "hires_strength", "hires_steps", "hires_upscaler")
FACTOR = 8
"""Pixels in a cell of the latents of Stable Diffusion, which a single file holds."""


def check_early(task: TaskKind, arguments: Mapping[str, Any], model: str | Path, own_vae: bool = True) -> None:
    """Raise ConfigError for options out of their ranges, a size that is not made of whole cells of latents, and a
    sampler with what it does not take.

    arguments: those of the task's method, by its names. own_vae: whether the model's own VAE will be there; without it
    nothing is known of cells. What is wrong with the model's files is left to loading them.
    """
    settings = read_settings({f.name: arguments[f.name] for f in fields(Settings) if f.name in arguments})  # type: ignore[typeddict-item]  # by name
    given = [arguments[name] for name in HIRES if name in arguments]
    if len(given) == len(HIRES):
        read_hires(*given)

    factor, schedule, own = _configured(model)
    if own_vae and factor:
        check_size(settings.width or factor, settings.height or factor, factor)
    chosen = plan_arguments(
        own, sampler=settings.sampler, sigmas=settings.sigmas, timestep_spacing=settings.timestep_spacing
    )
    if "sampler" in chosen:
        make_plan(schedule=schedule, num_inference_steps=settings.num_inference_steps, eta=settings.eta, **chosen)


def _configured(model: str | Path) -> tuple[int, NoiseSchedule, dict[str, Any]]:
    """The pixels in a cell of latents, 0 where they are not known; the schedule, and the model's own arguments of a
    plan. Of a single file the usual ones."""
    usual = NoiseSchedule()
    try:
        folder = base_of(find_model(model))
        if folder.is_file():
            return FACTOR, usual, {}
        factor = VAEConfig.from_dict(read_config(folder / "vae")).factor if (folder / "vae").is_dir() else 0
        config = read_config(folder / "scheduler", "scheduler_config.json")
    except SDKitError:
        return 0, usual, {}

    try:
        return factor, *read_scheduler_config(config)
    except ConfigError:  # a sampler that there is not here
        return factor, usual, {}
