"""Weight files: safetensors and pickles read, safetensors written, weights put into networks.

No network is ever used. A file is written under a temporary name and renamed, so that an error leaves nothing behind.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdkit.errors import CheckpointError, ConfigError, one_line
from sdkit.text import build_text_encoder, load_text_state
from sdkit.unet import UNet2DConditionModel
from sdkit.vae import AutoencoderKL

if TYPE_CHECKING:
    from transformers import CLIPTextModel

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)


def read_state(path: str | Path, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors or a pickled file, on the CPU, floating-point ones cast to ``dtype``.

    A pickle's tensors may lie under "state_dict"; it is read with ``weights_only=True``.
    Raises CheckpointError when the file is missing, damaged, of another format, or holds code.
    """
    path = existing_file(path)
    if is_safetensors(path):
        read_header(path)
        with reading(path), safe_open(path, framework="pt") as file:
            metadata = cast("dict[str, str]", file.metadata() or {})
            return {key: _cast(file.get_tensor(key), dtype) for key in file.keys()}, metadata  # noqa: SIM118
    content = read_pickle(path, "cpu")
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
        raise CheckpointError(f"{path}: cannot be written ({one_line(error)})") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def existing_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, {'found a folder' if path.is_dir() else 'there is none'}")
    return path


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn what torch and safetensors raise on a bad file into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises nearly anything on bytes that are no checkpoint
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from None


def is_safetensors(path: Path) -> bool:
    """By content: eight bytes of length, then a JSON object. A file that is neither this nor a pickle is refused."""
    with reading(path), path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return True
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return False
    raise CheckpointError(f"{path}: expected safetensors or a torch checkpoint, found neither")


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A safetensors header as (entry of each tensor, metadata). Raises CheckpointError when it or the file is cut."""
    with reading(path), path.open("rb") as file:
        size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: damaged or truncated safetensors file ({size} bytes)")
        header = cast("dict[str, Any]", json.loads(file.read(length)))
        metadata = cast("dict[str, str]", header.pop("__metadata__", None) or {})
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: truncated safetensors file: expected {8 + length + end} bytes, found {size}")
    return header, metadata


def read_pickle(path: Path, device: str) -> dict[Any, Any]:
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
        raise CheckpointError(f"{path}: damaged or no torch checkpoint: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return cast("dict[Any, Any]", content)


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
        raise CheckpointError(f"{where}: {part}: {one_line(error)}") from None


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
