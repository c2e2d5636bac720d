"""The ``sdkit`` command: make pictures, look into files, convert checkpoints.

Everything that needs torch is imported inside the commands, so that ``sdkit --help`` answers at once. A mistake
of the user's ends in one line on stderr: exit status 2 for a wrong command line, 1 for everything else.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sdkit.cli_options import DtypeOption, PredictionOption, find_dtype
from sdkit.cli_pictures import (
    WEIGHTS,
    ModelParts,
    check_writable,
    depth2img,
    find_adapter,
    img2img,
    inpaint,
    load_model,
    reproduce,
    txt2img,
)
from sdkit.errors import CheckpointError, ConfigError, SDKitError

if TYPE_CHECKING:
    from sdkit.vae import AutoencoderKL

app = typer.Typer(
    help="Latent diffusion from the command line.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


for command in (txt2img, img2img, inpaint, depth2img, reproduce):
    app.command()(command)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A model or a VAE (diffusers folder or single file), or a LoRA.")],
    target: Annotated[Path, typer.Argument(help="NAME.safetensors for a single file, another name for a folder.")],
    dtype: DtypeOption = None,
    prediction: PredictionOption = None,
    lora_format: Annotated[
        str | None, typer.Option("--format", help="Rewrite a LoRA: diffusers, peft (a folder) or kohya.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that the LoRA is for, where that is not Stable Diffusion 1 or 2.")
    ] = None,
) -> None:
    """Convert a model or a VAE between diffusers' folder layout and a single file, or a LoRA between its formats."""
    suffix = target.suffix.lower()
    if suffix in WEIGHTS[1:]:
        raise ConfigError(f"{target}: single files are written as .safetensors, not {suffix}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: already exists")
    check_writable(target, is_folder=suffix != ".safetensors")
    if lora_format is not None:
        sd = None if model is None else load_model(ModelParts(model), "cpu", None, None)
        find_adapter("convert_lora")(source, target, lora_format, sd)
        print(f"{target}  as {lora_format}")
        return

    from sdkit import checkpoint, inspection, single_file

    kind = str(inspection.inspect_file(source)["kind"])
    is_single_file = kind.endswith("single file") and not kind.startswith("SDXL")
    if prediction is not None and not is_single_file:
        raise ConfigError(f"--prediction: only for single files of a model; {source} is a {kind}")
    if is_single_file:
        loaded = single_file.load_single_file(source, prediction_type=prediction, dtype=find_dtype(dtype))
        checkpoint.save(loaded, target)
    elif kind == "diffusers folder":
        checkpoint.save(checkpoint.load_folder(source, dtype=find_dtype(dtype)), target)
    elif kind.startswith("VAE") or kind.endswith("AutoencoderKL"):
        vae = single_file.load_vae_file(source, dtype=find_dtype(dtype))
        (single_file.save_vae_file if suffix == ".safetensors" else _save_vae_folder)(vae, target)
    else:
        hint = " (--format converts LoRAs)" if "LoRA" in kind else ""
        raise CheckpointError(f"{source}: expected a Stable Diffusion model or a VAE, found {kind}{hint}")
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
