"""Decides, here alone, what a path is: a shipped model's name, a folder or a file; a whole model, or a VAE alone.

A file format is one module of functions and one row in `FORMATS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sdkit.checkpoints.companion_folder import base_of, is_companion, load_companion
from sdkit.checkpoints.components import Components, build_unet
from sdkit.checkpoints.diffusers_folder import load_folder, save_folder
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.single_file import load_single_file, save_single_file
from sdkit.checkpoints.text_encoder_file import load_text_encoder
from sdkit.checkpoints.vae_file import load_vae_file, load_vae_folder, save_vae_file, save_vae_folder
from sdkit.checks import as_path, expect
from sdkit.errors import CheckpointError, ConfigError
from sdkit.files import read_config
from sdkit.networks.vae import AutoencoderKL

if TYPE_CHECKING:
    from transformers import CLIPTextModel

MODELS = Path(__file__).parents[1] / "models"
"""The models that ship with us, each a diffusers folder or a companion of one."""

WORDS = "words.json"

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")
"""Endings of files that hold weights. We write the first alone."""


@dataclass(frozen=True)
class Format:
    """A file format.

    reads(kind): whether this format reads files of the kind that `inspect_file` says.
    load(path, dtype=None, **options) and save(what, path, dtype=None): Components for a whole model, an AutoencoderKL
        for a VAE. options: the further arguments that ``load`` takes.
    suffix: of what it writes; "" for a folder.
    """

    name: str
    reads: Callable[[str], bool]
    load: Callable[..., Any]
    save: Callable[..., None]
    suffix: str = ""
    options: tuple[str, ...] = ()


REPLACEABLE = ("vae", "text_encoder")
"""The networks that may be given in place of a model's own."""

FOLDER = Format(
    "diffusers folder",
    lambda kind: kind == "diffusers folder",
    load_folder,
    save_folder,
    options=("variant", *REPLACEABLE),
)
COMPANION = Format(
    "companion folder",
    lambda kind: kind == "companion folder",
    load_companion,
    save_folder,  # whole: what is different is nobody's to work out
    options=REPLACEABLE,
)
SINGLE_FILE = Format(
    "single file",
    lambda kind: kind.endswith("single file") and not kind.startswith("SDXL"),
    load_single_file,
    save_single_file,
    suffix=".safetensors",
    options=("preset", "prediction_type", "zero_snr", "use_ema", *REPLACEABLE),
)
FORMATS = (FOLDER, COMPANION, SINGLE_FILE)
"""The formats of whole models."""

VAE_FORMATS = (
    Format("VAE folder", lambda kind: kind.endswith("AutoencoderKL"), load_vae_folder, save_vae_folder),
    Format("VAE file", lambda kind: kind.startswith("VAE"), load_vae_file, save_vae_file, suffix=".safetensors"),
)
"""The formats of VAEs alone."""


def shipped_models() -> list[str]:
    """The names of the models that ship with us."""
    return sorted(path.name for path in MODELS.iterdir() if (path / "model_index.json").is_file() or is_companion(path))


def find_model(model: str | Path) -> Path:
    """The path of a shipped model's name, or the path itself. Raises CheckpointError when nothing is there."""
    names, given = shipped_models(), as_path("model", model)
    path = MODELS / str(model) if str(model) in names else given
    if not path.exists():
        raise CheckpointError(f"{model}: no such file or folder; {_remedy(str(model), names)}")
    return path


def _remedy(model: str, names: list[str]) -> str:
    """What to do where nothing is there: of a name as the hub has them, how to get it."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) is None or Path(model).suffix in SUFFIXES:
        return f"models that ship with sdkit: {', '.join(names)}"
    return f"nothing is downloaded: `hf download {model} --local-dir FOLDER` does, and FOLDER can be loaded"


def format_of(path: Path, formats: tuple[Format, ...] = FORMATS) -> Format | None:
    """The format in which ``path`` is written, None for another one. Raises CheckpointError for a damaged file."""
    kind = str(inspect_file(path)["kind"])
    return next((known for known in formats if known.reads(kind)), None)


def is_single_file(model: str | Path) -> bool:
    """Whether this names a file, by its ending where nothing is there, and not a folder or a shipped model."""
    path = as_path("model", model)
    return path.is_file() or (path.suffix.lower() in SUFFIXES and not path.is_dir())


def parameter_count(model: str | Path) -> int:
    """How many parameters a model has, by its files' headers or its UNet's configuration: no weight is read.

    Raises CheckpointError for what is no model.
    """
    path = base_of(find_model(model))
    if path.is_file():
        return int(inspect_file(path)["parameters"])
    return sum(p.numel() for p in build_unet(read_config(path / "unet"), str(path)).parameters())


def known_words(model: str | Path) -> frozenset[str] | None:
    """The words, in lower case, that a model's folder says it knows: ``words`` in its words.json; None where there is
    none. Raises CheckpointError where that is damaged."""
    folder = base_of(find_model(model))
    if not (folder / WORDS).is_file():
        return None
    words = read_config(folder, WORDS).get("words")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{folder / WORDS}: expected a list of words as words")
    return frozenset(words)


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    vae: str | Path | AutoencoderKL | None = None,
    text_encoder: str | Path | CLIPTextModel | None = None,
    **options: Any,
) -> Components:
    """Load a shipped model by its name, a diffusers folder or a single file; ``dtype`` None keeps the files' own.

    vae, text_encoder: a network, or its file or folder, in place of the model's own, which may be missing.
    options: of the format's ``load``; those that are None do not count. Raises CheckpointError, and ConfigError for an
    option that this format does not take.
    """
    path = find_model(model)
    by_ending = {known.suffix: known for known in FORMATS if known.suffix}
    of_folder = COMPANION if is_companion(path) else FOLDER
    chosen = by_ending.get(path.suffix.lower(), SINGLE_FILE) if path.is_file() else of_folder

    given = {"vae": vae, "text_encoder": text_encoder, **options}
    given = {name: value for name, value in given.items() if value is not None}
    _check_options(given)
    if unknown := sorted(given.keys() - set(chosen.options)):
        raise ConfigError(f"{', '.join(unknown)}: expected none, as {model} is a {chosen.name}, which says it itself")

    if isinstance(vae, str | Path):
        given["vae"] = load_vae(vae, dtype=dtype)
    if isinstance(text_encoder, str | Path):
        given["text_encoder"] = load_text_encoder(base_of(find_model(text_encoder)), dtype=dtype)
    return chosen.load(path, dtype=dtype, **given)


def _check_options(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for what is neither a network nor the path of one, and for a variant that is no name."""
    for name in given.keys() & set(REPLACEABLE):
        network = given[name]
        is_network = isinstance(network, nn.Module) and hasattr(network, "config")
        expect(is_network or isinstance(network, str | Path), name, "a network, or the path of one", network)
    if "variant" in given:
        variant = given["variant"]
        is_name = isinstance(variant, str) and re.fullmatch(r"[\w.-]{1,60}", variant) is not None
        expect(is_name, "variant", "the name of a variant, such as fp16", variant)


def load_vae(model: str | Path, *, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """Load a VAE alone, from a file or a folder, or that of a whole model. Raises CheckpointError."""
    path = base_of(find_model(model))
    if path.is_dir():
        return load_vae_folder(path / "vae" if (path / "vae").is_dir() else path, dtype=dtype)
    return load_vae_file(path, dtype=dtype)


def save(what: Components | AutoencoderKL, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Save a model, or a VAE alone: as a single file when ``path`` has such a format's ending, else as a folder.

    Raises CheckpointError when it cannot be written, ConfigError for the ending of another file.
    """
    suffix = as_path("path", path).suffix.lower()
    if suffix in SUFFIXES[1:]:
        raise ConfigError(f"{path}: single files are written as .safetensors, not {suffix}")

    formats = FORMATS if isinstance(what, Components) else VAE_FORMATS
    ending = suffix if suffix in {known.suffix for known in formats} else ""
    chosen = next(known for known in formats if known.suffix == ending)
    chosen.save(what, path, dtype=dtype)
