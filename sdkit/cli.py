"""The ``sdkit`` command: make pictures, look into files, convert checkpoints.

Everything that needs torch is imported inside the commands, so that ``sdkit --help`` answers at once. A mistake
of the user's ends in one line on stderr: exit status 2 for a wrong command line, 1 for everything else.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sdkit.errors import CheckpointError, ConfigError, SDKitError

if TYPE_CHECKING:
    import torch

    from sdkit.pipeline import StableDiffusion
    from sdkit.vae import AutoencoderKL

app = typer.Typer(
    help="Latent diffusion from the command line.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".bin")
STRIP_FRAMES = 8

# What of a picture's metadata is passed to text_to_image again.
ARGUMENTS = (
    "prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "guidance_rescale",
    "seed", "sampler", "sigmas", "timestep_spacing", "eta", "clip_skip", "prompt_weighting",
)  # fmt: skip


class Precision(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


ModelOption = Annotated[str, typer.Option(help="A model that ships with sdkit, a diffusers folder or a single file.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … (default: the GPU if there is one)")]
DtypeOption = Annotated[Precision | None, typer.Option(help="Precision of the networks.")]
BackendOption = Annotated[str | None, typer.Option(help="Kernels: auto, triton or eager.")]
PredictionOption = Annotated[
    str | None,
    typer.Option(help="What a single file's UNet predicts: epsilon, v_prediction (SD2's default) or sample."),
]
ProgressOption = Annotated[bool, typer.Option(help="Show a progress bar.")]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (``sys.argv`` by default) and exit: 0, 1 error, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = app(args=arguments or ["--help"], prog_name="sdkit", standalone_mode=False)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        message, status = _explain(error)
        if message is None:
            raise
        print(f"sdkit: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _explain(error: Exception) -> tuple[str | None, int]:
    """The message and exit status for an error of the user's; no message for a bug of ours."""
    usage_message = getattr(error, "format_message", None)  # the parser's own errors
    if usage_message is not None:
        return usage_message() + " (see sdkit --help)", 2
    if isinstance(error, SDKitError | OSError):
        return str(error) or type(error).__name__, 1
    if isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate memory", str(error)):
        detail = f" ({str(error).splitlines()[0]})" if str(error) else ""
        return f"not enough memory: use a smaller --width, --height or --num{detail}", 1
    return None, 1


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from sdkit import __version__

        print(f"sdkit {__version__}")


@app.command()
def txt2img(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    model: ModelOption = "tabletop",
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="How hard the prompt pulls; 0 ignores it.")] = 7.5,
    rescale: Annotated[float, typer.Option(help="Guidance rescale, 0 to 1.")] = 0.0,
    negative: Annotated[str | None, typer.Option(help="What the picture must not show.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture; the next has seed + 1.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, ddpm, euler, euler_a, heun, dpmpp_2m, …")] = None,
    sigmas: Annotated[str | None, typer.Option(help="Noise levels: karras, exponential or beta.")] = None,
    spacing: Annotated[str | None, typer.Option(help="Timesteps: leading, linspace or trailing.")] = None,
    num: Annotated[int, typer.Option(help="How many pictures.", min=1)] = 1,
    width: Annotated[int | None, typer.Option(help="Pixels (default: the model's).")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels (default: the model's).")] = None,
    clip_skip: Annotated[int, typer.Option(help="Layers of the text encoder to leave out (A1111's number - 1).")] = 0,
    out: Annotated[str, typer.Option(help="A .png file (numbered when --num > 1) or a folder.")] = "out.png",
    strip: Annotated[bool, typer.Option("--strip", help="Also write OUT-strip.png: the picture emerging.")] = False,
    preview_every: Annotated[
        int, typer.Option(help="Write OUT-stepNN.png every so many steps; --strip shows the same.", min=0)
    ] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = None,
    prediction: PredictionOption = None,
    progress: ProgressOption = True,
) -> None:
    """Make pictures from a prompt."""
    paths = _destinations(out, num)
    sd = _load(model, device, dtype, backend, prediction)
    arguments = {
        "prompt": prompt, "negative_prompt": negative, "height": height, "width": width, "num_inference_steps": steps,
        "guidance_scale": guidance, "guidance_rescale": rescale, "seed": seed, "sampler": sampler, "sigmas": sigmas,
        "timestep_spacing": spacing, "clip_skip": clip_skip,
    }  # fmt: skip
    every = preview_every or (max(1, -(-steps // STRIP_FRAMES)) if strip else 0)
    _make(sd, arguments, paths, model, progress, every, write_previews=preview_every > 0, strip=strip)


@app.command()
def reproduce(
    picture: Annotated[Path, typer.Argument(help="A PNG written by sdkit.")],
    out: Annotated[str, typer.Argument(help="A .png file or a folder.")],
    model: Annotated[str | None, typer.Option(help="The model, where the metadata's name does not find it.")] = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    progress: ProgressOption = True,
) -> None:
    """Make a picture again from the metadata of its PNG."""
    from sdkit.image import read_parameters

    parameters = read_parameters(picture)
    missing = [key for key in ("prompt", "seed", "num_inference_steps") if key not in parameters]
    if missing:
        raise SDKitError(f"{picture}: the metadata lacks {', '.join(missing)}")
    name = model or parameters.get("model")
    if not isinstance(name, str):
        raise SDKitError(f"{picture}: the metadata names no model: give --model")
    paths = _destinations(out, 1)
    dtype = parameters.get("dtype")
    sd = _load(name, device, Precision(dtype) if dtype in list(Precision) else None, backend)
    arguments = {key: parameters[key] for key in ARGUMENTS if key in parameters}
    _make(sd, arguments, paths, name, progress)


def _make(
    sd: StableDiffusion,
    arguments: Mapping[str, Any],
    paths: Sequence[Path],
    model: str,
    progress: bool,
    every: int = 0,
    write_previews: bool = False,
    strip: bool = False,
) -> None:
    """Generate one picture for each of ``paths``, write all files, print what was written."""
    from sdkit.image import write_png
    from sdkit.preview import film_strip

    started = time.perf_counter()
    result = sd.text_to_image(
        **arguments, num_images_per_prompt=len(paths), preview_every=every, progress=progress and sys.stderr.isatty()
    )
    seconds = time.perf_counter() - started
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for index, (path, image, seed) in enumerate(zip(paths, result.images, result.seeds, strict=True)):
        write_png(image, path, {**image.info, "model": model})
        print(f"{path}  seed {seed}  {seconds / len(paths):.1f} s")
        if write_previews:
            for preview in result.previews:
                print(write_png(preview.images[index], _beside(path, f"step{preview.step:02d}")))
        if strip:
            frames = [preview.images[index] for preview in result.previews]
            sheet = film_strip(frames, [preview.label for preview in result.previews], final=image)
            print(write_png(sheet, _beside(path, "strip"), {**image.info, "model": model}))


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
    _check_writable(path, is_folder=paths[0].parent == path)
    return paths


def _check_writable(path: Path, is_folder: bool) -> None:
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


def _load(
    model: str, device: str | None, dtype: Precision | None, backend: str | None, prediction: str | None = None
) -> StableDiffusion:
    """A shipped model, a diffusers folder or a single file."""
    from sdkit.pipeline import StableDiffusion

    options: dict[str, Any] = {"device": _device(device), "dtype": _dtype(dtype), "backend": backend}
    single_file = Path(model).suffix.lower() in WEIGHTS and not Path(model).is_dir()
    if prediction is not None:
        if not single_file:
            raise ConfigError(f"--prediction: only for single files; {model} says it itself")
        options["prediction_type"] = prediction
    load = StableDiffusion.from_single_file if single_file else StableDiffusion.from_pretrained
    return load(model, **options)


def _device(name: str | None) -> torch.device | None:
    """The device, tried out. Raises ConfigError when it is none, or is not there."""
    if name is None:
        return None
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def _dtype(precision: Precision | None) -> torch.dtype | None:
    if precision is None:
        return None
    import torch

    return getattr(torch, precision.value)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A model or a VAE: diffusers folder or single file.")],
    target: Annotated[Path, typer.Argument(help="NAME.safetensors for a single file, another name for a folder.")],
    dtype: DtypeOption = None,
    prediction: PredictionOption = None,
) -> None:
    """Convert a model or a VAE between diffusers' folder layout and a single file."""
    suffix = target.suffix.lower()
    if suffix in WEIGHTS[1:]:
        raise ConfigError(f"{target}: single files are written as .safetensors, not {suffix}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: already exists")
    _check_writable(target, is_folder=suffix != ".safetensors")

    from sdkit import checkpoint, inspection, single_file

    kind = str(inspection.inspect_file(source)["kind"])
    is_single_file = kind.endswith("single file") and not kind.startswith("SDXL")
    if prediction is not None and not is_single_file:
        raise ConfigError(f"--prediction: only for single files of a model; {source} is a {kind}")
    if is_single_file:
        model = single_file.load_single_file(source, prediction_type=prediction, dtype=_dtype(dtype))
        checkpoint.save(model, target)
    elif kind == "diffusers folder":
        checkpoint.save(checkpoint.load_folder(source, dtype=_dtype(dtype)), target)
    elif kind.startswith("VAE") or kind.endswith("AutoencoderKL"):
        vae = single_file.load_vae_file(source, dtype=_dtype(dtype))
        (single_file.save_vae_file if suffix == ".safetensors" else _save_vae_folder)(vae, target)
    else:
        raise CheckpointError(f"{source}: expected a Stable Diffusion model or a VAE, found {kind}")
    print(f"{target}  from {kind}")


def _save_vae_folder(vae: AutoencoderKL, target: Path) -> None:
    """The ``vae/`` folder of diffusers' layout, whole or not at all."""
    from sdkit.weights import write_state

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sdkit-", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        write_state(vae.state_dict(), folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(vae.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        folder.rename(target)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint, VAE, LoRA, diffusers folder, or a PNG of ours.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What is this file: kind, version, shapes."""
    if not file.exists():
        raise CheckpointError(f"{file}: no such file or folder")
    if file.suffix.lower() == ".png":
        from sdkit.image import read_parameters

        facts: dict[str, Any] = {"kind": "picture", **read_parameters(file)}
    else:
        from sdkit.inspection import inspect_file

        facts = inspect_file(file)
    print(json.dumps(facts, indent=2, default=str) if as_json else "\n".join(_table(facts)))


def _table(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """Aligned ``name  value`` lines; what lies in a mapping is set in below its name."""
    width = max((len(str(key)) for key in facts), default=0)
    lines: list[str] = []
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}", *_table(value, indent + "  ")]
            continue
        lines.append(f"{indent}{key:<{width}}  {_text(value)}".rstrip())
    return lines


def _text(value: Any) -> str:
    """Shapes as 8 x 3 x 3, other lists with commas, a picture's prompt in one line."""
    if isinstance(value, list | tuple):
        return (" x " if all(isinstance(v, int) for v in value) else ", ").join(map(str, value))
    return " ".join(str(value).split())
