"""The commands for files: convert, and inspect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkit.adapter_kinds import AdapterKind, adapter_kinds
from sdkit.cli.options import (
    DtypeOption,
    PredictionOption,
    TextEncoderOption,
    VaeOption,
    ZeroSnrOption,
)
from sdkit.cli.output import check_writable
from sdkit.errors import CheckpointError, ConfigError, printable
from sdkit.model_parts import ModelParts, load_model

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def convert(
    source: Annotated[Path, typer.Argument(help="A model or a VAE (diffusers folder or single file), or a LoRA.")],
    target: Annotated[Path, typer.Argument(help="NAME.safetensors for a single file, another name for a folder.")],
    dtype: DtypeOption = None,
    prediction: PredictionOption = None,
    zero_snr: ZeroSnrOption = None,
    vae: VaeOption = None,
    text_encoder: TextEncoderOption = None,
    adapter_format: Annotated[
        str | None,
        typer.Option("--format", help="Rewrite a LoRA: diffusers, peft (a folder) or kohya (with --dtype: as it is)."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that the LoRA is for, where that is not Stable Diffusion 1 or 2.")
    ] = None,
) -> None:
    """Convert a model or a VAE between diffusers' folder layout and a single file, or a LoRA between its formats."""
    from sdkit.checkpoints.inspection import inspect_file
    from sdkit.checkpoints.loading import FORMATS, SUFFIXES, VAE_FORMATS, format_of, load, save
    from sdkit.devices import find_dtype

    options = {"prediction_type": prediction, "zero_snr": zero_snr, "vae": vae, "text_encoder": text_encoder}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}

    suffix = target.suffix.lower()
    if suffix in SUFFIXES[1:]:
        raise ConfigError(f"{target}: single files are written as .safetensors, not {suffix}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: already exists")
    check_writable(target, is_folder=suffix != ".safetensors")

    if adapter_format is None and dtype is not None:
        adapter_format = _own_format(str(inspect_file(source)["kind"]))
    if adapter_format is not None:
        _refuse(given, f"only for models; {source} becomes {adapter_format}")
        sd = None if model is None else load_model(ModelParts(model), "cpu")
        _kind_of(adapter_format).module.convert(source, target, adapter_format, sd, find_dtype(dtype))
        print(f"{target}  as {adapter_format}")
        return

    kind = str(inspect_file(source)["kind"])
    if model is not None:
        raise ConfigError(f"--model: only for adapters that are rewritten by --format; {source} is a {kind}")
    chosen = format_of(source, (*FORMATS, *VAE_FORMATS))
    if chosen is None:
        hint = " (--format converts LoRAs)" if "LoRA" in kind else ""
        raise CheckpointError(f"{source}: expected a Stable Diffusion model or a VAE, found {kind}{hint}")

    where = "single files of a model" if chosen in FORMATS else "models"
    _refuse({n: v for n, v in given.items() if n not in chosen.options}, f"only for {where}; {source} is a {kind}")
    what = load if chosen in FORMATS else chosen.load
    save(what(source, dtype=find_dtype(dtype), **given), target)
    print(f"{target}  from {kind}")


def _refuse(given: Mapping[str, Any], why: str) -> None:
    """Raise ConfigError for options of `convert` that were given and would do nothing."""
    for name in given:
        flag = name.removesuffix("_type").replace("_", "-")
        raise ConfigError(f"--{flag}: {why}")


def _own_format(kind: str) -> str | None:
    """The format of an adapter's file by what `inspect_file` calls it; None for another file, or another format."""
    known = [name for adapter in adapter_kinds() if kind in adapter.files for name in adapter.formats]
    return next((name for name in known if kind.endswith(f"({name})")), None)


def _kind_of(adapter_format: str) -> AdapterKind:
    """The kind of adapters that is written in this format. Raises ConfigError for an unknown one."""
    known = {name: kind for kind in adapter_kinds() for name in kind.formats}
    if adapter_format not in known:
        raise ConfigError(f"format: expected {', '.join(sorted(known)) or 'none'}, found {adapter_format!r}")
    return known[adapter_format]


def inspect(
    file: Annotated[
        Path, typer.Argument(help="A checkpoint, VAE, LoRA, diffusers folder, or a picture by us, A1111 or ComfyUI.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What is this file: kind, version, shapes."""
    if not file.exists():
        raise CheckpointError(f"{file}: no such file or folder")

    if file.suffix.lower() in PICTURES:
        from sdkit.generation.png import read_foreign, read_parameters

        if (foreign := read_foreign(file)) is None:
            facts: dict[str, Any] = {"kind": "picture", **read_parameters(file)}
        else:
            facts = {"kind": f"picture by {foreign.program}", **foreign.facts, "not followed": dict(foreign.rest)}
    else:
        from sdkit.checkpoints.inspection import inspect_file
        from sdkit.checkpoints.textual_inversion import load_textual_inversion

        facts = inspect_file(file)
        if facts["kind"] == "textual inversion":
            with suppress(CheckpointError):
                facts["in prompts"] = list(load_textual_inversion(file).triggers)
    print(json.dumps(facts, indent=2, default=str) if as_json else printable("\n".join(_table(facts))))


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
