"""The commands that make pictures: one for each task, and reproduce, which makes a picture again."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdkit.cli.options import (
    BackendOption,
    DeviceOption,
    EmbeddingOption,
    Given,
    GraphsOption,
    Precision,
    PredictionOption,
    ProgressOption,
    TextEncoderOption,
    VaeOption,
    ZeroSnrOption,
)
from sdkit.cli.output import Destinations, Watch, destinations, write_pictures
from sdkit.errors import SDKitError
from sdkit.model_parts import ModelParts, load_model

if TYPE_CHECKING:
    from sdkit.stable_diffusion import StableDiffusion

STRIP_FRAMES = 8
OTHER_FACTS = {"task", "files", "dtype", "version"}  # beside arguments and the model's parts


def make_pictures(given: Given) -> None:
    """Load the model, make the pictures, write them."""
    arguments, output = dict(given.arguments), given.output
    places = destinations(output.out, arguments.pop("num_images_per_prompt"))
    parts = given.model.parts(given.adapters)

    asked, steps = arguments.pop("preview_every"), arguments["num_inference_steps"]
    watch = Watch(
        arguments.pop("progress"),
        every=asked or (max(1, -(-steps // STRIP_FRAMES)) if output.strip else 0),
        previews=asked > 0,
        strip=output.strip,
        attention=output.attention_map,
    )

    given.check_early()
    sd = given.model.load(given.adapters)
    _make(sd, given.task.method, arguments, places, parts, watch)


def reproduce(
    picture: Annotated[Path, typer.Argument(help="A PNG written by sdkit, or a picture by A1111 or ComfyUI.")],
    out: Annotated[str, typer.Argument(help="A .png file or a folder.")],
    model: Annotated[str | None, typer.Option(help="The model, where the metadata's name does not find it.")] = None,
    vae: VaeOption = None,
    text_encoder: TextEncoderOption = None,
    embedding: EmbeddingOption = (),  # type: ignore[assignment]  # typer gives a list
    prediction: PredictionOption = None,
    zero_snr: ZeroSnrOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    graphs: GraphsOption = None,
    progress: ProgressOption = True,
    adapters: Mapping[str, list[str]] = {},  # `with_adapters` makes options of it
) -> None:
    """Make a picture again from its metadata. The files that it was made from have to be as they were.

    A picture by A1111 or ComfyUI is drawn from what its metadata says as far as that has a meaning here, with --model
    and the files that are given; what is not followed is listed.
    """
    from sdkit.generation.provenance import arguments_of

    parts = ModelParts(
        model or "",
        prediction,
        None if vae is None else str(vae),
        adapters,
        [str(file) for file in embedding],
        zero_snr,
        None if text_encoder is None else str(text_encoder),
    )
    facts = _facts(picture, {name: value for name, value in parts.given().items() if value != ""})
    task, arguments = arguments_of(facts, str(picture))
    if not isinstance(facts.get("model"), str):
        raise SDKitError(f"{picture}: the metadata names no model: give --model")
    if unknown := sorted(facts.keys() - arguments.keys() - ModelParts.names() - OTHER_FACTS):
        raise SDKitError(f"{picture}: made with what is not known here: {', '.join(unknown)}")

    places, parts = destinations(out, 1), ModelParts.read(facts)
    dtype = Precision(facts["dtype"]) if facts.get("dtype") in list(Precision) else None
    sd = load_model(parts, device, dtype, backend, graphs)
    _make(sd, task, arguments, places, parts, Watch(progress=progress))


def _facts(picture: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture says of how it was made, but for what is ``given``; lists on stderr what is not followed."""
    from sdkit.generation.png import read_foreign, read_parameters

    foreign = read_foreign(picture)
    if foreign is None:
        facts = {**read_parameters(picture), **given}
        went_in = dict(facts.pop("adapters", {})) | {"embedding": facts.pop("triggers", [])}
        for kind, names in went_in.items():
            if names and kind not in facts:
                raise SDKitError(
                    f"{picture}: made with {kind} {', '.join(names)}, of which no file is known: give --{kind}"
                )
        return facts
    if "model" not in given:
        called = f", called {foreign.model}," if foreign.model else ""
        raise SDKitError(f"{picture}: made by {foreign.program}: give its model{called} by --model")

    for name, value in foreign.rest.items():
        print(f"{picture}: not followed: {name}: {value}", file=sys.stderr)
    return {**foreign.facts, **given}


def _make(
    sd: StableDiffusion,
    task: str,
    arguments: Mapping[str, Any],
    places: Destinations,
    parts: ModelParts,
    watch: Watch,
) -> None:
    """Make one picture for each of ``places`` and write it."""
    started = time.perf_counter()
    result = getattr(sd, task)(
        **arguments,
        num_images_per_prompt=len(places.paths),
        preview_every=watch.every,
        attention_maps=watch.attention,
        progress=watch.progress and sys.stderr.isatty(),
    )
    write_pictures(result, places, parts.facts(), watch, time.perf_counter() - started)
