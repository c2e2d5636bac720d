"""The commands for files: convert, and inspect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkit.adapter_kinds import AdapterKind, adapter_kinds
from sdkit.cli.models import ModelParts, load_model
from sdkit.cli.options import DtypeOption, PredictionOption, find_dtype
from sdkit.cli.output import check_writable
from sdkit.errors import CheckpointError, ConfigError


def convert(
    source: Annotated[Path, typer.Argument(help="A model or a VAE (diffusers folder or single file), or a LoRA.")],
    target: Annotated[Path, typer.Argument(help="NAME.safetensors for a single file, another name for a folder.")],
    dtype: DtypeOption = None,
    prediction: PredictionOption = None,
    adapter_format: Annotated[
        str | None, typer.Option("--format", help="Rewrite a LoRA: diffusers, peft (a folder) or kohya.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that the LoRA is for, where that is not Stable Diffusion 1 or 2.")
    ] = None,
) -> None:
    """Convert a model or a VAE between diffusers' folder layout and a single file, or a LoRA between its formats."""
    from sdkit.checkpoints.inspection import inspect_file
    from sdkit.checkpoints.loading import FORMATS, SUFFIXES, VAE_FORMATS, format_of, save

    suffix = target.suffix.lower()
    if suffix in SUFFIXES[1:]:
        raise ConfigError(f"{target}: single files are written as .safetensors, not {suffix}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: already exists")
    check_writable(target, is_folder=suffix != ".safetensors")

    if adapter_format is not None:
        sd = None if model is None else load_model(ModelParts(model), "cpu", None, None)
        _kind_of(adapter_format).module.convert(source, target, adapter_format, sd)
        print(f"{target}  as {adapter_format}")
        return

    kind = str(inspect_file(source)["kind"])
    options: dict[str, Any] = {"dtype": find_dtype(dtype)}
    chosen = format_of(source, (*FORMATS, *VAE_FORMATS))
    if prediction is not None:
        if chosen is None or "prediction_type" not in chosen.options:
            raise ConfigError(f"--prediction: only for single files of a model; {source} is a {kind}")
        options["prediction_type"] = prediction
    if chosen is None:
        hint = " (--format converts LoRAs)" if "LoRA" in kind else ""
        raise CheckpointError(f"{source}: expected a Stable Diffusion model or a VAE, found {kind}{hint}")

    save(chosen.load(source, **options), target)
    print(f"{target}  from {kind}")


def _kind_of(adapter_format: str) -> AdapterKind:
    """The kind of adapters that is written in this format. Raises ConfigError for an unknown one."""
    known = {name: kind for kind in adapter_kinds() for name in kind.formats}
    if adapter_format not in known:
        raise ConfigError(f"format: expected {', '.join(sorted(known)) or 'none'}, found {adapter_format!r}")
    return known[adapter_format]


def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint, VAE, LoRA, diffusers folder, or a PNG of ours.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What is this file: kind, version, shapes."""
    if not file.exists():
        raise CheckpointError(f"{file}: no such file or folder")

    if file.suffix.lower() == ".png":
        from sdkit.generation.png import read_parameters

        facts: dict[str, Any] = {"kind": "picture", **read_parameters(file)}
    else:
        from sdkit.checkpoints.inspection import inspect_file

        facts = inspect_file(file)
    print(json.dumps(facts, indent=2, default=str) if as_json else "\n".join(_table(facts)))


def _table(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """Aligned ``name  value`` lines; the entries of a mapping are set in below its name."""
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
