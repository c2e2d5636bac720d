"""How a picture was made: the facts that its metadata holds, and the arguments that make it again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sdkit
from sdkit.errors import SDKitError
from sdkit.inputs import file_hash

if TYPE_CHECKING:
    from sdkit.generation import Generation

# The arguments of each task that the metadata holds; those of `text_to_image` hold for all.
SHARED = (
    "prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "guidance_rescale",
    "guidance_interval", "dynamic_threshold", "sample_max_value", "clip_sample_range", "seed", "variation_seed",
    "variation_strength", "sampler", "sigmas", "timestep_spacing", "eta", "clip_skip", "prompt_weighting",
)  # fmt: skip
TASKS = {
    "text_to_image": ("hires_scale", "hires_strength", "hires_steps", "hires_upscaler"),
    "image_to_image": ("image", "strength"),
    "inpaint": ("image", "mask_image", "strength", "mask_blur"),
    "depth_to_image": ("image", "depth_map", "strength"),
}


def facts_of(run: Generation, index: int) -> dict[str, Any]:
    """What made image number ``index`` of a batch: arguments of its task by their names, and

    task: its method, where that is not text_to_image; files: the SHA-256 of every file that went in; sampler: the one
    used; dtype; version. Values are plain JSON.
    """
    task, settings, noise = run.task, run.settings, run.noise
    words = index // settings.num_images_per_prompt
    facts: dict[str, Any] = {"task": task.name} if task.name != "text_to_image" else {}
    if run.wording.prompts is not None:
        facts["prompt"] = run.wording.prompts[words]
    facts["negative_prompt"] = run.wording.negatives[words]
    facts |= {"height": task.height, "width": task.width, "sampler": run.plans[0].sampler} | settings.facts()
    if noise.seeds and settings.latents is None:
        facts["seed"] = noise.seeds[index]
    if noise.variation_seeds:
        facts["variation_seed"] = noise.variation_seeds[index]
    own = {"strength": task.strength, "mask_blur": task.mask_blur}
    facts |= {name: value for name, value in own.items() if name in TASKS[task.name]}
    if task.hires is not None:
        facts |= {f"hires_{name}": value for name, value in vars(task.hires).items()}
    paths = {name: paths[run.rows(len(paths), name)[index]] for name, paths in task.sources.items()}
    facts |= {name: path for name, path in paths.items() if path is not None}
    if files := {path: file_hash(path) for path in paths.values() if path is not None}:
        facts["files"] = files
    return facts | {"dtype": str(run.sd.dtype).removeprefix("torch."), "version": sdkit.__version__}


def arguments_of(facts: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The method's name and the arguments that make a picture again, from what `facts_of` said.

    ``where`` names the picture in errors. Raises SDKitError when something is missing, or a file is not what it was.
    """
    task = facts.get("task", "text_to_image")
    if task not in TASKS:
        raise SDKitError(f"{where}: expected one of the tasks {', '.join(TASKS)}, found {task!r}")
    needed = ("prompt", "seed", "num_inference_steps", *(n for n in ("image", "mask_image") if n in TASKS[task]))
    missing = [name for name in needed if name not in facts]
    if missing:
        raise SDKitError(f"{where}: the metadata lacks {', '.join(missing)}")
    if "classifier" in facts:
        raise SDKitError(f"{where}: made with the classifier {facts['classifier']}, which no metadata can hold")
    for path, expected in dict(facts.get("files", {})).items():
        found = file_hash(path)
        if found != expected:
            raise SDKitError(f"{path}: not the file that made {where}: expected SHA-256 {expected}, found {found}")
    arguments = {name: facts[name] for name in (*SHARED, *TASKS[task]) if name in facts}
    if interval := arguments.get("guidance_interval"):
        arguments["guidance_interval"] = (interval[0], math.inf if interval[1] is None else interval[1])
    return task, arguments
