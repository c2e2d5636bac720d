"""Files of tensors: safetensors and pickles, read and written. Code in a pickle is never run."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdkit.checkpoints.pickles import read_pickle, tensors_in
from sdkit.checks import as_path
from sdkit.devices import check_dtype
from sdkit.errors import CheckpointError, NumericalError, one_line
from sdkit.files import parse_json, replacing


def read_state(
    path: str | Path, dtype: torch.dtype | None = None, exact: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and metadata of a safetensors or a pickled file, on the CPU, floating-point ones as ``dtype``.

    Those of 8 bits, which nothing computes with, become float16 where ``dtype`` is None. Tensors named in ``exact``
    keep their own. A pickle's tensors may lie under "state_dict", "model" or "module" (`sdkit.checkpoints.pickles`). A
    prefix that wrappers of torch put before every name ("module.", "_orig_mod.") is taken away.
    Raises CheckpointError when the file is missing, damaged, or of another format.
    """
    path = existing_file(path)
    if is_safetensors(path):
        read_header(path)
        with reading(path), safe_open(path, framework="pt") as file:
            metadata = cast("dict[str, str]", file.metadata() or {})
            keys = cast("list[str]", file.keys())
            state = {key: _cast(file.get_tensor(key), None if key in exact else dtype) for key in keys}
            return _without_wrappers(state), metadata

    tensors = tensors_in(read_pickle(path, "cpu", stubs=True), str(path))
    return _without_wrappers({k: _cast(v, None if k in exact else dtype) for k, v in tensors.items()}), {}


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that they have in the module itself, not in a DistributedDataParallel around it."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(key.startswith(prefix) for key in state):
            return _without_wrappers({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return state


def write_state(
    state: Mapping[str, Tensor],
    path: str | Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, under a temporary name first; the same tensors are the same bytes.

    Raises CheckpointError when it cannot be written, NumericalError for a tensor that is not finite, or not as
    ``dtype``, ConfigError for a dtype that weights are not written in.
    """
    check_dtype(dtype)
    tensors = {key: _cast(value.detach(), dtype).cpu().contiguous() for key, value in state.items()}
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            why = f"its largest value does not fit {dtype}" if is_finite(state[key]) else "it has NaN or infinity"
            raise NumericalError(f"{path}: {key} is not saved: {why}")

    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, {"format": "pt"} | dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(str(error)) from None
        _sort_metadata(temporary)


def _sort_metadata(file: Path) -> None:
    """Put the metadata of a safetensors file in the order of their names: the library writes them in any."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length, file
        stream.seek(8)
        stream.write(text)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are; of a tensor without data it is not known to have others."""
    if tensor.numel() == 0 or tensor.device.type == "meta" or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)  # both are NaN where one value is; no map of bools
    return bool(torch.isfinite(low) & torch.isfinite(high))


def write_pickle(content: object, path: str | Path) -> None:
    """Write tensors and plain values in torch's older form: A1111 refuses the members that newer zip files carry.

    Raises CheckpointError when it cannot be written.
    """
    with replacing(path) as temporary:
        torch.save(content, temporary, _use_new_zipfile_serialization=False)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None and tensor.is_floating_point() and tensor.itemsize == 1:
        dtype = torch.float16  # holds every value of float8_e4m3fn and float8_e5m2
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def existing_file(path: str | Path) -> Path:
    path = as_path("path", path)
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
    """Whether the content is safetensors (eight bytes of length, then JSON). Raises CheckpointError if it is no pickle
    either."""
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
    """Read a safetensors header: tensors' entries, and metadata. Raises CheckpointError when it or the file is cut."""
    with reading(path), path.open("rb") as file:
        size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: damaged or truncated safetensors file ({size} bytes)")
        header = cast("dict[str, Any]", parse_json(file.read(length), f"{path}: damaged header", CheckpointError))
        metadata = cast("dict[str, str]", header.pop("__metadata__", None) or {})
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: truncated safetensors file: expected {8 + length + end} bytes, found {size}")
    return header, metadata
