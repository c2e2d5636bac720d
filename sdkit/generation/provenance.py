"""How a picture was made: the facts that its metadata holds, and the arguments that make it again."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdkit.adapter_kinds import adapter_kinds
from sdkit.diffusion_model import DiffusionModel
from sdkit.errors import SDKitError
from sdkit.files import file_hash
from sdkit.generation.options import TASKS, Settings, declarations
from sdkit.generation.request import Request
from sdkit.prompts.tokens import used_triggers
from sdkit.version import __version__

SHARED = (
    "prompt",
    "negative_prompt",
    *(name for name, option in declarations(Settings).items() if option.remembered is not None),
)
"""The arguments of all tasks that the metadata holds; `TASKS` has those of each."""

PARTS = ("vae", "text_encoder")
HELD = ("model", "prediction", "zero_snr", *PARTS)
"""What the metadata holds of `DiffusionModel.made_of`: the options of the command line that make it again."""


def facts_of(request: Request, index: int, altered_by: Sequence[str] = ()) -> dict[str, Any]:
    """The facts by which image number ``index`` of a batch was made: arguments of its task by their names, and

    task: its method, where that is not text_to_image; model and its parts: what it was loaded from; files: the SHA-256
    of every file that went in; sampler: the one used; dtype; version; adapters: the scale of each that ran without a
    tag, by kind and name; triggers: the words of textual inversions in the prompts; not_held: what went in and no
    metadata can hold, the callbacks among it that the run was ``altered_by``. Values are plain JSON.
    """
    task, settings, noise = request.task, request.settings, request.noise
    facts: dict[str, Any] = {"task": task.name} if task.name != "text_to_image" else {}

    # The words of this image.
    row = index // settings.num_images_per_prompt
    if request.prompts.given is not None:
        facts["prompt"] = request.prompts.given[row]
    facts["negative_prompt"] = request.prompts.negatives[row]

    # The settings, and the values that the model chose where they were left to it.
    facts |= {"height": task.height, "width": task.width, "sampler": request.plans[0].sampler} | settings.facts()
    if noise.seeds and settings.latents is None:
        facts["seed"] = noise.seeds[index]
    if noise.variation_seeds:
        facts["variation_seed"] = noise.variation_seeds[index]

    # The task's own arguments, files by path and hash.
    own = {argument.name for argument in TASKS[task.name].arguments}
    facts |= {name: getattr(task, name) for name in ("strength", "mask_blur") if name in own}
    if task.hires is not None:
        facts |= {f"hires_{name}": value for name, value in vars(task.hires).items()}
    paths = {name: paths[request.rows(len(paths), name)[index]] for name, paths in task.sources.items()}
    facts |= {name: path for name, path in paths.items() if path is not None}

    # The model, and every file that went in.
    made_of = request.model.made_of
    facts |= {name: value for name, value in made_of.items() if name in HELD and value is not None}
    went_in = [path for path in paths.values() if path is not None]
    went_in += [made_of[name] for name in PARTS if name in made_of and Path(made_of[name] or "").is_file()]
    if files := {path: _known_hash(path) for path in went_in}:
        facts["files"] = files

    # What is known here but cannot be held.
    not_held = [name for name, path in paths.items() if path is None]
    not_held += [name for name, value in made_of.items() if name not in HELD or value is None]
    not_held += [name for name in ("prompt_embeds", "negative_prompt_embeds") if getattr(settings, name) is not None]
    not_held += dict.fromkeys(altered_by)
    more = {"not_held": not_held, "adapters": _adapters(request.model), "triggers": _triggers(request, row)}
    facts |= {name: value for name, value in more.items() if value}

    return facts | {"dtype": str(request.model.dtype).removeprefix("torch."), "version": __version__}


def with_parts(facts: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a picture, and those of the model's parts that it was made with, `sdkit.model_parts.ModelParts`."""
    files = facts.get("files", {}) | parts.get("files", {})
    return {**facts, **parts} | ({"files": files} if files else {})


def _known_hash(path: str) -> str:
    """`file_hash`, once for all pictures as long as the file stays as it is."""
    try:
        found = os.stat(path)
    except OSError:
        return file_hash(path)  # which says what is wrong
    return _hash(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=64)
def _hash(path: str, changed: int, size: int) -> str:
    return file_hash(path)


def _adapters(model: DiffusionModel) -> dict[str, dict[str, float]]:
    """The adapters that run: by kind and name their scales."""
    running = {
        kind.name: {name: a.scale for name, a in kind.module.list_adapters(model).items() if a.enabled and a.scale}
        for kind in adapter_kinds()
        if kind.name in model.adapter_kinds
    }
    return {kind: adapters for kind, adapters in running.items() if adapters}


def _triggers(request: Request, row: int) -> list[str]:
    texts = [*(request.prompts.texts or [""] * request.prompts.count)[row : row + 1], request.prompts.negatives[row]]
    weighted = request.settings.prompt_weighting
    return sorted(used_triggers(texts, list(request.model.textual_inversions), weighted=weighted))


def arguments_of(facts: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The method's name and the arguments that make a picture again, from what `facts_of` said.

    ``where`` names the picture in errors. Raises SDKitError when something is missing, or a file is not what it was.
    """
    task = facts.get("task", "text_to_image")
    if task not in TASKS:
        raise SDKitError(f"{where}: expected one of the tasks {', '.join(TASKS)}, found {task!r}")

    own = TASKS[task].arguments
    needed = ("prompt", "seed", "num_inference_steps", *(a.name for a in own if a.is_file and a.is_required))
    missing = [name for name in needed if name not in facts]
    if missing:
        raise SDKitError(f"{where}: the metadata lacks {', '.join(missing)}")
    if "classifier" in facts:
        raise SDKitError(f"{where}: made with the classifier {facts['classifier']}, which no metadata can hold")
    if facts.get("not_held"):
        raise SDKitError(f"{where}: made with {', '.join(facts['not_held'])}, which no metadata can hold")

    for path, expected in dict(facts.get("files", {})).items():
        found = file_hash(path)
        if found != expected:
            raise SDKitError(f"{path}: not the file that made {where}: expected SHA-256 {expected}, found {found}")

    arguments = {name: facts[name] for name in (*SHARED, *(a.name for a in own)) if name in facts}
    if interval := arguments.get("guidance_interval"):
        arguments["guidance_interval"] = (interval[0], math.inf if interval[1] is None else interval[1])
    return task, arguments
