"""The commands that make pictures: txt2img, img2img, inpaint, depth2img, and reproduce, which makes one again."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdkit.cli_options import (
    BackendOption,
    DeviceOption,
    ImageOption,
    Precision,
    ProgressOption,
    PromptArgument,
    Shared,
    StrengthOption,
    file_and_weight,
    find_dtype,
    takes_shared,
)
from sdkit.errors import ConfigError, SDKitError

if TYPE_CHECKING:
    from sdkit.pipeline import StableDiffusion

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".bin")
STRIP_FRAMES = 8


@takes_shared
def txt2img(
    shared: Shared,
    prompt: PromptArgument,
    hires: Annotated[float | None, typer.Option(help="Enlarge the picture by this and work on it again.")] = None,
    hires_strength: Annotated[float, typer.Option(help="How much is changed then, 0 to 1.")] = 0.7,
    hires_steps: Annotated[int | None, typer.Option(help="Sampling steps then (default: --steps).")] = None,
    hires_upscaler: Annotated[str, typer.Option(help="nearest, bilinear or bicubic.")] = "bilinear",
) -> None:
    """Make pictures from a prompt."""
    arguments = {
        "prompt": prompt, "hires_scale": hires, "hires_strength": hires_strength, "hires_steps": hires_steps,
        "hires_upscaler": hires_upscaler,
    }  # fmt: skip
    _make(shared, "text_to_image", arguments)


@takes_shared
def img2img(shared: Shared, prompt: PromptArgument, image: ImageOption, strength: StrengthOption = 0.75) -> None:
    """Make pictures from a prompt and a picture."""
    _make(shared, "image_to_image", {"prompt": prompt, "image": str(image), "strength": strength})


@takes_shared
def inpaint(
    shared: Shared,
    prompt: PromptArgument,
    image: ImageOption,
    mask: Annotated[Path, typer.Option(help="White is repainted, black stays as it is.")],
    strength: StrengthOption = 1.0,
    mask_blur: Annotated[int, typer.Option(help="Pixels around the mask over which the new fades out.", min=0)] = 0,
) -> None:
    """Repaint a part of a picture."""
    arguments = {
        "prompt": prompt, "image": str(image), "mask_image": str(mask), "strength": strength, "mask_blur": mask_blur,
    }  # fmt: skip
    _make(shared, "inpaint", arguments)


@takes_shared
def depth2img(
    shared: Shared,
    prompt: PromptArgument,
    image: ImageOption,
    depth: Annotated[Path | None, typer.Option(help="Depth map, near is white (default: estimated).")] = None,
    strength: StrengthOption = 0.75,
) -> None:
    """Make pictures from a prompt that keep the depth of a picture."""
    arguments: dict[str, Any] = {"prompt": prompt, "image": str(image), "strength": strength}
    _make(shared, "depth_to_image", arguments | ({} if depth is None else {"depth_map": str(depth)}))


def reproduce(
    picture: Annotated[Path, typer.Argument(help="A PNG written by sdkit.")],
    out: Annotated[str, typer.Argument(help="A .png file or a folder.")],
    model: Annotated[str | None, typer.Option(help="The model, where the metadata's name does not find it.")] = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    progress: ProgressOption = True,
) -> None:
    """Make a picture again from the metadata of its PNG. The files that it was made from have to be as they were."""
    from sdkit.image import read_parameters
    from sdkit.provenance import arguments_of

    facts = read_parameters(picture) | ({} if model is None else {"model": model})
    task, arguments = arguments_of(facts, str(picture))
    if not isinstance(facts.get("model"), str):
        raise SDKitError(f"{picture}: the metadata names no model: give --model")
    paths = _destinations(out, 1)
    given: dict[str, Any] = {f.name: facts[f.name] for f in fields(ModelParts) if f.name in facts}
    parts = ModelParts(**given)
    dtype = Precision(facts["dtype"]) if facts.get("dtype") in list(Precision) else None
    sd = load_model(parts, device, dtype, backend)
    _write(sd, task, arguments, paths, parts, Watch(progress=progress))


@dataclass(frozen=True)
class ModelParts:
    """What pictures are made with: a model, and what is put into it. A picture's metadata holds this."""

    model: str
    prediction: str | None = None
    vae: str | None = None
    lora: list[str] = field(default_factory=list[str])  # FILE:WEIGHT, as given
    hypernetwork: list[str] = field(default_factory=list[str])
    embedding: list[str] = field(default_factory=list[str])

    def facts(self) -> dict[str, Any]:
        """What there is of it, and the SHA-256 of every file but the model's, which may be large."""
        from sdkit.inputs import file_hash

        files = [file_and_weight(text)[0] for text in (*self.lora, *self.hypernetwork)] + list(self.embedding)
        files += [self.vae] if self.vae is not None and Path(self.vae).is_file() else []
        facts = {name: value for name, value in asdict(self).items() if value}
        return facts | ({"files": {file: file_hash(file) for file in files}} if files else {})


@dataclass(frozen=True)
class Watch:
    """What is shown and written beside the pictures."""

    progress: bool = True
    every: int = 0
    previews: bool = False
    strip: bool = False
    attention: bool = False


def _make(shared: Shared, task: str, arguments: Mapping[str, Any]) -> None:
    """Load the model, make the pictures, write them."""
    paths = _destinations(shared.out, shared.num)
    parts = ModelParts(
        shared.model, shared.prediction, None if shared.vae is None else str(shared.vae), list(shared.lora),
        list(shared.hypernetwork), [str(file) for file in shared.embedding],
    )  # fmt: skip
    given = shared.arguments() | dict(arguments)
    sd = load_model(parts, shared.device, shared.dtype, shared.backend)
    every = shared.preview_every or (max(1, -(-shared.steps // STRIP_FRAMES)) if shared.strip else 0)
    watch = Watch(shared.progress, every, shared.preview_every > 0, shared.strip, shared.attention_map)
    _write(sd, task, given, paths, parts, watch)


def _write(
    sd: StableDiffusion, task: str, arguments: Mapping[str, Any], paths: Sequence[Path], parts: ModelParts, watch: Watch
) -> None:
    """Generate one picture for each of ``paths``, write all files, print what was written."""
    from sdkit.attention_maps import attention_sheet
    from sdkit.image import write_png
    from sdkit.preview import film_strip

    started = time.perf_counter()
    result = getattr(sd, task)(
        **arguments, num_images_per_prompt=len(paths), preview_every=watch.every,
        attention_maps=watch.attention, progress=watch.progress and sys.stderr.isatty(),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    made_with = parts.facts()
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for index, (path, image, seed) in enumerate(zip(paths, result.images, result.seeds, strict=True)):
        files = image.info.get("files", {}) | made_with.get("files", {})
        facts = image.info | made_with | ({"files": files} if files else {})
        write_png(image, path, facts)
        print(f"{path}  seed {seed}  {seconds / len(paths):.1f} s")
        if watch.previews:
            for preview in result.previews:
                print(write_png(preview.images[index], _beside(path, f"step{preview.step:02d}")))
        if watch.strip:
            frames = [preview.images[index] for preview in result.previews]
            sheet = film_strip(frames, [preview.label for preview in result.previews], final=image)
            print(write_png(sheet, _beside(path, "strip"), facts))
        if watch.attention:
            sheet = attention_sheet(image, result.attention_maps, index=index)
            print(write_png(sheet, _beside(path, "attention"), facts))


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.stem}-{what}.png")


def _destinations(out: str, count: int) -> list[Path]:
    """The files to write. Raises ConfigError now, before the work, when they could not be written."""
    path = Path(out)
    if path.is_dir() or out.endswith("/"):
        taken = [int(f.name[:4]) for f in path.glob("*.png") if re.fullmatch(r"\d{4}(-.*)?\.png", f.name)]
        first = max(taken, default=0) + 1
        paths = [path / f"{first + i:04d}.png" for i in range(count)]
    elif path.suffix.lower() != ".png":
        raise ConfigError(f"{out}: expected a name that ends in .png, or a folder (with / at the end to create it)")
    elif count == 1:
        paths = [path]
    else:
        paths = [path.with_name(f"{path.stem}-{i + 1:04d}{path.suffix}") for i in range(count)]
    for file in paths:
        if file.exists() and not file.is_file():
            raise ConfigError(f"{file}: cannot be written: not a regular file")
    check_writable(path, is_folder=paths[0].parent == path)
    return paths


def check_writable(path: Path, is_folder: bool) -> None:
    """Try to write beside ``path`` (in it, or where it would be made, for a folder). Leaves nothing behind."""
    folder = path if is_folder else path.parent
    while is_folder and not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "no such folder" if not folder.exists() else (error.strerror or str(error)).lower()
        raise ConfigError(f"{path}: cannot be written: {folder}: {reason}") from None


def load_model(parts: ModelParts, device: str | None, dtype: Precision | None, backend: str | None) -> StableDiffusion:
    """A shipped model, a diffusers folder or a single file, and everything that goes into it."""
    from sdkit.devices import find_device
    from sdkit.pipeline import StableDiffusion

    model, place = parts.model, None if device is None else find_device(device)
    options: dict[str, Any] = {"device": place, "dtype": find_dtype(dtype), "backend": backend}
    single_file = Path(model).suffix.lower() in WEIGHTS and not Path(model).is_dir()
    if parts.prediction is not None:
        if not single_file:
            raise ConfigError(f"--prediction: only for single files; {model} says it itself")
        options["prediction_type"] = parts.prediction
    load = StableDiffusion.from_single_file if single_file else StableDiffusion.from_pretrained
    sd = load(model, **options)
    if parts.vae is not None:
        sd.load_vae(parts.vae)
    for kind, given in (("lora", parts.lora), ("hypernetwork", parts.hypernetwork)):
        for file, weight in map(file_and_weight, given):
            find_adapter(kind)(sd, file, weight)
    for file in parts.embedding:
        sd.load_textual_inversion(file)
    return sd


def find_adapter(name: str) -> Any:
    """What an installed distribution offers for adapters under this name: "lora" and "hypernetwork" load a file,
    (sd, path, weight) -> None, "convert_lora" rewrites one. Raises ConfigError when none does."""
    from importlib.metadata import entry_points

    found = list(entry_points(group="sdkit.adapters", name=name))
    if not found:
        raise ConfigError(f"{name}: nothing installed offers this entry point of group sdkit.adapters")
    return found[0].load()
