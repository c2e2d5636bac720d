"""The commands that make pictures: one for each task, and reproduce, which makes a picture again."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdkit.cli.models import ModelParts, load_model
from sdkit.cli.options import BackendOption, DeviceOption, Given, Precision, ProgressOption
from sdkit.cli.output import Watch, destinations, write_pictures
from sdkit.errors import SDKitError

if TYPE_CHECKING:
    from sdkit.stable_diffusion import StableDiffusion

STRIP_FRAMES = 8
OTHER_FACTS = {"task", "files", "dtype", "version"}  # beside arguments and the model's parts


def make_pictures(given: Given) -> None:
    """Load the model, make the pictures, write them."""
    arguments, output = dict(given.arguments), given.output
    paths = destinations(output.out, arguments.pop("num_images_per_prompt"))
    parts = ModelParts(
        given.model.model,
        given.model.prediction,
        None if given.model.vae is None else str(given.model.vae),
        given.adapters,
        [str(file) for file in given.model.embedding],
    )

    asked, steps = arguments.pop("preview_every"), arguments["num_inference_steps"]
    watch = Watch(
        arguments.pop("progress"),
        every=asked or (max(1, -(-steps // STRIP_FRAMES)) if output.strip else 0),
        previews=asked > 0,
        strip=output.strip,
        attention=output.attention_map,
    )

    sd = load_model(parts, given.model.device, given.model.dtype, given.model.backend)
    _make(sd, given.task.method, arguments, paths, parts, watch)


def reproduce(
    picture: Annotated[Path, typer.Argument(help="A PNG written by sdkit.")],
    out: Annotated[str, typer.Argument(help="A .png file or a folder.")],
    model: Annotated[str | None, typer.Option(help="The model, where the metadata's name does not find it.")] = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    progress: ProgressOption = True,
) -> None:
    """Make a picture again from the metadata of its PNG. The files that it was made from have to be as they were."""
    from sdkit.generation.png import read_parameters
    from sdkit.generation.provenance import arguments_of

    facts = read_parameters(picture) | ({} if model is None else {"model": model})
    task, arguments = arguments_of(facts, str(picture))
    if not isinstance(facts.get("model"), str):
        raise SDKitError(f"{picture}: the metadata names no model: give --model")
    if unknown := sorted(facts.keys() - arguments.keys() - ModelParts.names() - OTHER_FACTS):
        raise SDKitError(f"{picture}: made with what is not known here: {', '.join(unknown)}")

    paths, parts = destinations(out, 1), ModelParts.read(facts)
    dtype = Precision(facts["dtype"]) if facts.get("dtype") in list(Precision) else None
    sd = load_model(parts, device, dtype, backend)
    _make(sd, task, arguments, paths, parts, Watch(progress=progress))


def _make(
    sd: StableDiffusion,
    task: str,
    arguments: Mapping[str, Any],
    paths: list[Path],
    parts: ModelParts,
    watch: Watch,
) -> None:
    """Make one picture for each of ``paths`` and write it."""
    started = time.perf_counter()
    result = getattr(sd, task)(
        **arguments,
        num_images_per_prompt=len(paths),
        preview_every=watch.every,
        attention_maps=watch.attention,
        progress=watch.progress and sys.stderr.isatty(),
    )
    write_pictures(result, paths, parts.facts(), watch, time.perf_counter() - started)
