"""Checkpoints: diffusers folders, reading and writing of weight files, and what is in a file.

No network is ever used. Files are written under a temporary name and renamed, so that an error leaves nothing behind.
Single files have their own module, ``sdkit.single_file``; ``load`` and ``save`` choose by what lies at the path.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdkit.config import UNetConfig, VAEConfig, read_json
from sdkit.errors import CheckpointError, ConfigError
from sdkit.text import build_text_encoder, load_text_state, load_tokenizer, save_tokenizer, text_state_dict
from sdkit.unet import UNet2DConditionModel
from sdkit.vae import AutoencoderKL

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
PIPELINES = {9: "StableDiffusionInpaintPipeline", 5: "StableDiffusionDepth2ImgPipeline"}
DIFFUSERS_VERSION = "0.42.0"


@dataclass
class Components:
    """The parts of a latent diffusion model.

    ``scheduler_config`` is diffusers' dict. ``extra`` holds, for each folder of a diffusers pipeline that is carried
    along but not used here (``depth_estimator`` and its ``feature_extractor``), its library, class and path.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    extra: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> Components:
    """Load a diffusers folder or a single file. Raises CheckpointError."""
    from sdkit.single_file import load_single_file

    return load_folder(path, dtype=dtype) if Path(path).is_dir() else load_single_file(path, dtype=dtype)


def save(components: Components, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Save as a single file when ``path`` ends in .safetensors, else as a diffusers folder."""
    from sdkit.single_file import save_single_file

    (save_single_file if Path(path).suffix.lower() == ".safetensors" else save_folder)(components, path, dtype=dtype)


# ---- weight files ----------------------------------------------------------------------------------------------------


def read_state(path: str | Path, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors or a pickled file, on the CPU, floating-point ones cast to ``dtype``.

    A pickle's tensors may lie under "state_dict"; it is read with ``weights_only=True``.
    Raises CheckpointError when the file is missing, damaged, of another format, or holds code.
    """
    path = _existing(path)
    if _is_safetensors(path):
        _read_header(path)
        with _reading(path), safe_open(path, framework="pt") as file:
            metadata = cast("dict[str, str]", file.metadata() or {})
            return {key: _cast(file.get_tensor(key), dtype) for key in file.keys()}, metadata  # noqa: SIM118
    content = _read_pickle(path, "cpu")
    content = content.get("state_dict", content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors under state_dict, found {type(content).__name__}")
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors or len(tensors) < len(content):
        found = next((f"{k!r} is a {type(v).__name__}" for k, v in content.items() if k not in tensors), "it is empty")
        raise CheckpointError(f"{path}: expected a dict of tensors, but {found}")
    return {key: _cast(tensor, dtype) for key, tensor in tensors.items()}, {}


def write_state(
    state: Mapping[str, Tensor],
    path: str | Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, under a temporary name first. Raises CheckpointError when it cannot be written."""
    path = Path(path).absolute()
    if not path.name:
        raise CheckpointError(f"{path}: cannot be written (it is a folder)")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = {key: _cast(value.detach(), dtype).cpu().contiguous() for key, value in state.items()}
    try:
        save_file(tensors, temporary, {"format": "pt"} | dict(metadata or {}))
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({_reason(error)})") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _reason(error: BaseException) -> str:
    """The error's message in one line of at most 200 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, {'found a folder' if path.is_dir() else 'there is none'}")
    return path


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """Turn what torch and safetensors raise on a bad file into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises nearly anything on bytes that are no checkpoint
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from None


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes of length, then a JSON object. A file that is neither this nor a pickle is refused."""
    with _reading(path), path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return True
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return False
    raise CheckpointError(f"{path}: expected safetensors or a torch checkpoint, found neither")


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A safetensors header as (entry of each tensor, metadata). Raises CheckpointError when it or the file is cut."""
    with _reading(path), path.open("rb") as file:
        size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: damaged or truncated safetensors file ({size} bytes)")
        header = cast("dict[str, Any]", json.loads(file.read(length)))
        metadata = cast("dict[str, str]", header.pop("__metadata__", None) or {})
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: truncated safetensors file: expected {8 + length + end} bytes, found {size}")
    return header, metadata


def _read_pickle(path: Path, device: str) -> dict[Any, Any]:
    """The dict in a pickled file; on the device "meta" without its data."""
    try:
        with path.open("rb") as file:
            mapped = file.read(2) == b"PK" and device == "cpu"
        content = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # anything can be wrong with a pickle
        if "weights_only" in str(error).lower() or "Unsupported" in str(error):
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            found = f" ({name[1]})" if name else ""
            raise CheckpointError(f"{path}: the pickle holds code or objects{found}, only tensors are loaded") from None
        raise CheckpointError(f"{path}: damaged or no torch checkpoint: {_reason(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return cast("dict[Any, Any]", content)


# ---- networks --------------------------------------------------------------------------------------------------------


def build_networks(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text_encoder: Mapping[str, Any], where: str
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """The three networks of these configs on the meta device: without memory, waiting for their weights."""
    part = "unet"
    try:
        with torch.device("meta"):
            unet_model = UNet2DConditionModel.from_config(unet)
            part = "vae"
            vae_model = AutoencoderKL.from_config(vae)
            part = "text_encoder"
            return unet_model, vae_model, build_text_encoder(text_encoder)
    except (ConfigError, TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(f"{where}: {part}: {_reason(error)}") from None


def give_weights(module: Module, state: Mapping[str, Tensor], where: str) -> Module:
    """Put the tensors of ``state`` themselves into a network built on the meta device; returns it in eval mode.

    Raises CheckpointError that names the first missing, unexpected or misshapen key.
    """
    expected = module.state_dict()
    for what, keys in (("missing", expected.keys() - state.keys()), ("unexpected", state.keys() - expected.keys())):
        if keys:
            raise CheckpointError(f"{where}: {len(keys)} {what} keys, the first {min(keys)}")
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            found = list(state[key].shape)
            raise CheckpointError(f"{where}: {key}: expected the shape {list(tensor.shape)}, found {found}")
    module.load_state_dict(state, assign=True)
    return module.eval()


def give_text_weights(model: CLIPTextModel, state: Mapping[str, Tensor], where: str) -> CLIPTextModel:
    """The same for the text encoder, whose keys may start with ``text_model.`` or not."""
    try:
        unused = load_text_state(model, state)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if unused:
        logger.info("%s: left out %s", where, ", ".join(unused))
    return model


def read_old_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's state dict with today's attention names and [C, C] weights, from old names or [C, C, 1(, 1)] weights."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        key = re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{old[m[2]]}.", key)
        result[key] = tensor.flatten(1) if re.search(r"attentions\.\d+\.to_.*\.weight$", key) else tensor
    return result


# ---- diffusers folders -----------------------------------------------------------------------------------------------


def load_folder(path: str | Path, *, dtype: torch.dtype | None = None, variant: str | None = None) -> Components:
    """Load a folder in diffusers' layout; ``dtype`` None keeps the files' own. Raises CheckpointError.

    ``variant`` picks files such as ``….fp16.safetensors``; without it the plain ones, or else the only variant there.
    """
    folder = Path(path)
    extra = _read_index(folder)

    def part(name: str, weights: str = "diffusion_pytorch_model") -> tuple[dict[str, Any], dict[str, Tensor]]:
        return _read_config(folder / name), load_weights(folder / name, weights, variant=variant, dtype=dtype)

    (unet_config, unet_state), (vae_config, vae_state) = part("unet"), part("vae")
    text_config, text_state = part("text_encoder", "model")
    unet, vae, text = build_networks(unet_config, vae_config, text_config, str(folder))
    return Components(
        unet=give_weights(unet, unet_state, str(folder / "unet")),
        vae=give_weights(vae, read_old_attention(vae_state), str(folder / "vae")),
        text_encoder=give_text_weights(text, text_state, str(folder / "text_encoder")),
        tokenizer=load_tokenizer(folder / "tokenizer"),
        scheduler_config=_read_config(folder / "scheduler", "scheduler_config.json"),
        extra=extra,
    )


def _read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    try:
        return read_json(folder / name)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """Check model_index.json against what we can run; the parts that are only carried along."""
    if not (folder / "model_index.json").is_file():
        found = "there is no such folder" if not folder.exists() else "it has no model_index.json"
        raise CheckpointError(f"{folder}: expected a model in diffusers' folder layout, but {found}")
    index = _read_config(folder, "model_index.json")
    parts = {k: cast("list[str]", v) for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}  # pyright: ignore[reportUnknownArgumentType]
    for name, classes in CLASSES.items():
        found = parts.pop(name, ["", "nothing"])[1]
        if found not in classes:
            raise CheckpointError(f"{folder}: expected {name} to be {classes[0]}, found {found}")
    if parts.pop("scheduler", None) is None:
        raise CheckpointError(f"{folder}: model_index.json names no scheduler")
    carried = ("depth_estimator", "feature_extractor") if "depth_estimator" in parts else ()
    for name in parts.keys() & {"safety_checker", "feature_extractor", "image_encoder"} - set(carried):
        logger.warning("%s: %s is left out", folder, name)
        del parts[name]
    if unknown := parts.keys() - set(carried):
        raise CheckpointError(f"{folder}: not supported: {', '.join(f'{n} ({parts[n][1]})' for n in sorted(unknown))}")
    return {n: {"library": parts[n][0], "class": parts[n][1], "path": str(folder / n)} for n in carried if n in parts}


def load_weights(
    folder: str | Path, name: str, *, variant: str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of ``folder``'s weights ``name`` ("diffusion_pytorch_model" or "model"): one file or shards.

    Prefers safetensors to .bin. Raises CheckpointError when there are none, or several variants and none was chosen.
    """
    file = _find_weights(Path(folder), name, variant)
    if file.suffix != ".json":
        return read_state(file, dtype)[0]
    places = _read_config(file.parent, file.name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) and Path(p).name == p for p in places.values()):
        raise CheckpointError(f"{file}: expected a weight_map of file names")
    weight_map = cast("dict[str, str]", places)
    state: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        state |= read_state(file.parent / shard, dtype)[0]
    if missing := weight_map.keys() - state.keys():
        raise CheckpointError(f"{file}: {len(missing)} keys are not in their shards, the first {min(missing)}")
    return state


def _find_weights(folder: Path, name: str, variant: str | None) -> Path:
    pickled = "pytorch_model" if name == "model" else name
    suffix = f".{variant}" if variant else ""
    files = (f"{name}{suffix}.safetensors", f"{name}.safetensors.index{suffix}.json",
             f"{pickled}{suffix}.bin", f"{pickled}.bin.index{suffix}.json")  # fmt: skip
    for file in files:
        if (folder / file).is_file():
            return folder / file
    pattern = rf"({name}|{pickled})\.((safetensors|bin)\.index\.)?(?P<variant>(?!index\.)\w+)\.(safetensors|bin|json)"
    matches = (re.fullmatch(pattern, file.name) for file in folder.glob("*"))
    variants = sorted({match["variant"] for match in matches if match})
    if variant is None and len(variants) == 1:
        logger.info("%s: only the variant %s is there, so it is read", folder, variants[0])
        return _find_weights(folder, name, variants[0])
    there = f" but the variants {', '.join(variants)}: choose one" if variants else ""
    raise CheckpointError(f"{folder}: no {files[0]}{there}")


def save_folder(components: Components, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Save in diffusers' folder layout, weights cast to ``dtype``. Raises CheckpointError when it cannot be written.

    It is written beside ``path`` and renamed; in a folder that exists, files of the same name are replaced.
    """
    with _new_folder(Path(path).absolute()) as folder:
        _save_network(components.unet, components.unet.config, folder / "unet", dtype)
        _save_network(components.vae, components.vae.config, folder / "vae", dtype)
        (folder / "text_encoder").mkdir()
        _write_json(folder / "text_encoder" / "config.json", text_config(components.text_encoder))
        write_state(text_state_dict(components.text_encoder), folder / "text_encoder" / "model.safetensors", dtype)
        save_tokenizer(components.tokenizer, folder / "tokenizer")
        (folder / "scheduler").mkdir()
        _write_json(folder / "scheduler" / "scheduler_config.json", components.scheduler_config)
        for name, entry in components.extra.items():
            shutil.copytree(entry["path"], folder / name)
        _write_json(folder / "model_index.json", _model_index(components))


def text_config(model: CLIPTextModel) -> dict[str, Any]:
    """The text encoder's config.json."""
    values = model.config.to_diff_dict()
    return {"architectures": ["CLIPTextModel"]} | {k: v for k, v in values.items() if k != "transformers_version"}


def _model_index(components: Components) -> dict[str, Any]:
    nothing = [None, None]
    channels = components.unet.config.in_channels
    index: dict[str, Any] = {
        "_class_name": PIPELINES.get(channels, "StableDiffusionPipeline"),
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", components.scheduler_config.get("_class_name", "DDIMScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if channels == 5:
        index |= {"depth_estimator": nothing, "feature_extractor": nothing}
    else:
        index |= {"safety_checker": nothing, "feature_extractor": nothing, "requires_safety_checker": False}
    return index | {name: [entry["library"], entry["class"]] for name, entry in components.extra.items()}


def _save_network(module: nn.Module, config: UNetConfig | VAEConfig, folder: Path, dtype: torch.dtype | None) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", config.to_dict() | {"_diffusers_version": DIFFUSERS_VERSION})
    write_state(module.state_dict(), folder / "diffusion_pytorch_model.safetensors", dtype)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(path: Path) -> Generator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` at the end, or is removed after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if path.exists():
            for stale in ("tokenizer.json", "added_tokens.json"):  # these would win over the files that we write
                (path / "tokenizer" / stale).unlink(missing_ok=True)
            files = [f for f in temporary.rglob("*") if f.is_file()]
            for file in sorted(files, key=lambda f: f.name == "model_index.json"):
                target = path / file.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        else:
            os.rename(temporary, path)
    except (OSError, shutil.Error) as error:
        raise CheckpointError(f"{path}: cannot be written ({_reason(error)})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- what is in a file -----------------------------------------------------------------------------------------------

# Kinds in the order in which they are tried: a key that only such a file has.
KINDS = {
    "SDXL single file": r"conditioner\.embedders\..*",
    "{version} single file": r"(model\.diffusion_model\.|model_ema\.diffusion_model).*",
    "LoRA (kohya)": r"lora_(unet|te)\w*\..*",
    "LoRA (peft)": r"base_model\.model\..*lora_[AB].*",
    "LoRA (diffusers)": r".*(lora_[AB]|lora\.(up|down)|_lora\.(up|down)|lora_linear_layer).*",
    "VAE (single file)": r"(first_stage_model\.)?decoder\.up\.0\.block\.0\..*",
    "VAE (diffusers)": r"decoder\.up_blocks\.0\.resnets\.0\..*",
    "UNet (diffusers)": r"down_blocks\.0\.resnets\.0\.time_emb_proj\.weight",
    "text encoder": r"(text_model\.)?embeddings\.token_embedding\.weight",
    "textual inversion": r"emb_params|string_to_param\..*|<.*>",
    "hypernetwork": r"\d+\.[01]\.linear.*",
}
MODELS = {(768, 4): "SD1", (768, 9): "SD1 inpainting", (1024, 4): "SD2", (1024, 9): "SD2 inpainting",
          (1024, 5): "SD2 depth"}  # fmt: skip
BASES = {"sd_v1": "SD1", "sd_v2": "SD2", "sd_v2_v": "SD2 (v prediction)"}  # kohya's names
TELLING = {
    "context": r".*(input_blocks\.[12]\.1|down_blocks[._]0[._]attentions[._]0)[._]transformer_blocks[._]0[._]attn2"
    r"[._]to_k(\.weight|\.lora_down\.weight|\.lora_A(\.\w+)?\.weight|\.lora\.down\.weight)",
    "input": r"model\.diffusion_model\.input_blocks\.0\.0\.weight|conv_in\.weight",
    "latent": r".*post_quant_conv\.weight",
    "tokens": r".*(token_embedding\.weight)",
}


def inspect_file(path: str | Path) -> dict[str, Any]:
    """What lies at ``path``: kind, version, numbers of tensors and parameters, dtypes, telling shapes, metadata.

    Of a safetensors file only the header is read. Raises CheckpointError when it is missing or damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_folder(path)
    _existing(path)
    if _is_safetensors(path):
        header, metadata = _read_header(path)
        with _reading(path):
            entries = {k: (str(e["dtype"]), tuple(int(n) for n in e["shape"])) for k, e in header.items()}
    else:
        content = _read_pickle(path, "meta")
        entries = {
            key: (str(value.dtype).removeprefix("torch."), tuple(value.shape))
            for key, value in _flat(content.get("state_dict", content))
        }
        metadata = {}
    return _describe(entries, metadata)


def _describe(entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> dict[str, Any]:
    kind = next((k for k, pattern in KINDS.items() if any(re.fullmatch(pattern, key) for key in entries)), "unknown")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, pattern in TELLING.items():
        key = next((key for key in sorted(entries) if re.fullmatch(pattern, key)), None)
        if key is not None:
            shapes[f"{name}: {key}"] = entries[key][1]
    width = next((shape[1] for name, shape in shapes.items() if name.startswith("context") and len(shape) > 1), None)
    channels = next((shape[1] for name, shape in shapes.items() if name.startswith("input") and len(shape) > 1), 4)
    base = BASES.get(metadata.get("ss_base_model_version", ""))
    version = base or (None if width is None else MODELS.get((width, channels), f"context width {width}"))
    dtypes = sorted({dtype for dtype, _ in entries.values()})
    return {
        "kind": kind.format(version=version or "Stable Diffusion"),
        "version": version or "unknown",
        "tensors": len(entries),
        "parameters": sum(prod(shape) for _, shape in entries.values()),
        "dtypes": {dtype: sum(found == dtype for found, _ in entries.values()) for dtype in dtypes},
        "shapes": shapes,
        "metadata": {key: value if len(value) <= 200 else value[:200] + "…" for key, value in metadata.items()},
    }


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts and sequences, named by its path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType, reportUnknownArgumentType]
        for key, inner in cast("list[tuple[Any, Any]]", list(items)):  # pyright: ignore[reportUnknownArgumentType]
            yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _inspect_folder(folder: Path) -> dict[str, Any]:
    """A diffusers folder, one network of it, or a peft adapter."""
    if (folder / "model_index.json").is_file():
        index, unet = _read_config(folder, "model_index.json"), _read_config(folder / "unet")
        width, channels = unet.get("cross_attention_dim"), unet.get("in_channels", 4)
        parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1:] != [None]}
        version = MODELS.get((int(width or 0), int(channels)), f"context width {width}")
        return {"kind": "diffusers folder", "version": version, "pipeline": index.get("_class_name"), "parts": parts}
    if (folder / "adapter_config.json").is_file():
        facts = inspect_file(folder / "adapter_model.safetensors")
        return facts | {"config": _read_config(folder, "adapter_config.json")}
    if (folder / "config.json").is_file():
        config = _read_config(folder)
        kind = config.get("_class_name") or next(iter(config.get("architectures") or ["unknown"]))
        return {"kind": f"folder of one network, {kind}", "config": config}
    raise CheckpointError(f"{folder}: expected a model folder, but it has no model_index.json and no config.json")
