"""Damage done to files, drawn from a seed: to their bytes, to values of their JSON, to their tensors."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load, save
from torch import Tensor

Damage = Callable[[random.Random, bytes], bytes]

ESCAPE = "\x1b[31mred\x07"
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"), 2**31, 2**63, 10**30,
    10**9, 2000, "", "x", "a" * 10_000, ESCAPE, "\ud800", "../../etc/passwd", "(a+)+$", "1", "auto", [], [None],
    [0], [-1], [1, 2], [1.5], ["x"], [[1]], [4] * 2000, {}, {"x": 1}, {"": None}, [{}],
)  # fmt: skip
"""What stands in no field of a good file, or in another one."""


# Bytes


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def flipped_early(rng: random.Random, content: bytes) -> bytes:
    """Where formats say what follows."""
    return flipped(rng, content[:512]) + content[512:]


def zeroed(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content))
    length = rng.choice((4, 64, 4096))
    return content[:start] + bytes(min(length, len(content) - start)) + content[start + length :]


def longer(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.randbytes(rng.choice((1, 8, 1000))) + content[start:]


BYTES: tuple[Damage, ...] = (cut, flipped, flipped_early, zeroed, longer)


# JSON


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of keys and indices to every value in a JSON value, but for its own."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        pairs = list(value.items())  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(value, list):
        pairs = list(enumerate(value))  # pyright: ignore[reportUnknownArgumentType]
    found: list[tuple[Any, ...]] = []
    for key, inner in pairs[:2000]:
        found += [(*path, key), *places(inner, (*path, key))]
    return found


def changed_value(rng: random.Random, value: Any) -> Any:
    """The JSON value with one of its parts replaced, left out, added, or given twice."""
    value = copy.deepcopy(value)
    known = places(value)
    if not known:
        return rng.choice(ODD)

    *path, key = rng.choice(known)
    holder = value
    for step in path:
        holder = holder[step]
    how = rng.random()
    if how < 0.75:
        holder[key] = rng.choice(ODD)
    elif how < 0.88:
        del holder[key]
    elif isinstance(holder, dict):
        holder[rng.choice(("unknown", ESCAPE, "", "__class__"))] = rng.choice(ODD)
    else:
        holder += [rng.choice(ODD)] * rng.choice((1, 3000))
    return value


def odd_json(rng: random.Random, content: bytes) -> bytes:
    """Texts that JSON parsers stumble over."""
    return rng.choice(
        (
            b"", b"null", b"[]", b"{}", b"3", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}",
            b"\xef\xbb\xbf" + content, content + content, b'{"x": ' + b"9" * 5000 + b"}",
            content.replace(b":", b"=", 1), content.replace(b'"', b"'"),
            content.replace(b"{", b'{"a": NaN, ', 1), content.replace(b"{", b'{"a": -Infinity, ', 1),
        )
    )  # fmt: skip


def changed_json(rng: random.Random, content: bytes) -> bytes:
    return json.dumps(changed_value(rng, json.loads(content))).encode()


JSON: tuple[Damage, ...] = (
    changed_json,
    changed_json,
    changed_json,
    changed_json,
    changed_json,
    odd_json,
    cut,
    flipped,
)
LINES: tuple[Damage, ...] = (
    *BYTES,
    lambda rng, content: b"\n".join(rng.sample(lines := content.split(b"\n"), len(lines))),
    lambda rng, content: content.replace(b"\n", rng.choice((b"\r", b"\0", b",,,,\n", b"\x1b[31m\n")), 3),
    lambda rng, content: content + rng.choice((b"{", b"a" * 1_000_000, b'"', b"\xff" * 10)),
)


# Tensors

DTYPES = (
    torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


def changed_tensor(rng: random.Random, tensor: Tensor) -> Tensor:
    """Of another type, shape or size, or with numbers that are none."""
    changes: tuple[Callable[[], Tensor], ...] = (
        lambda: tensor.to(rng.choice(DTYPES)),
        lambda: tensor[..., :-1] if tensor.dim() and tensor.shape[-1] else tensor.new_zeros(3),
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor.new_zeros(0),
        lambda: tensor.new_tensor(1.0) if tensor.is_floating_point() else tensor.new_zeros(()),
        lambda: tensor.T.contiguous() if tensor.dim() == 2 else tensor.new_zeros(2, 2),
        lambda: torch.cat([tensor, tensor]) if tensor.dim() else tensor.new_zeros(5),
        lambda: spoiled(tensor, float("nan")),
        lambda: spoiled(tensor, float("inf")),
        lambda: tensor.double() * 1e30,
    )
    return rng.choice(changes)().contiguous()


def spoiled(tensor: Tensor, value: float) -> Tensor:
    """The tensor with one number replaced."""
    changed = tensor.float().clone().flatten()
    changed[: min(1, len(changed))] = value
    return changed.view(tensor.shape)


def changed_state(rng: random.Random, state: dict[Any, Any]) -> dict[Any, Any]:
    """A state dict with one entry changed, renamed, left out or added."""
    state = dict(state)
    key = rng.choice(list(state))
    how = rng.random()
    if how < 0.6 and isinstance(state[key], Tensor):
        state[key] = changed_tensor(rng, state[key])
    elif how < 0.75:
        del state[key]
    elif how < 0.9:
        state[rng.choice((f"{key}.x", ESCAPE, "", "a.b.c", str(key).replace("weight", "bias")))] = state.pop(key)
    else:
        state[rng.choice((f"{key}2", ESCAPE, f"{ESCAPE}.lora_up.weight"))] = torch.zeros(2, 2)
    return state


def changed_tensors(rng: random.Random, content: bytes) -> bytes:
    """Of a safetensors file. Its metadata stay."""
    return save(changed_state(rng, load(content)), header_of(content).get("__metadata__"))


def header_of(content: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def changed_header(rng: random.Random, content: bytes) -> bytes:
    """Of a safetensors file: a value in its header, or the header as a whole."""
    (length,) = struct.unpack("<Q", content[:8])
    text = json.dumps(header_of(content)).encode()
    new = changed_json(rng, text) if rng.random() < 0.85 else odd_json(rng, text)
    said = len(new) if rng.random() < 0.9 else rng.choice((0, 2**63, len(new) - 1, len(content) * 2))
    return struct.pack("<Q", said) + new + content[8 + length :]


SAFETENSORS: tuple[Damage, ...] = (
    changed_tensors,
    changed_tensors,
    changed_tensors,
    changed_header,
    changed_header,
    *BYTES,
)


# What torch.save writes


def changed_content(rng: random.Random, content: bytes) -> bytes:
    """One value of what is in it, tensors among them, replaced by what the file's readers do not expect."""
    value = torch.load(io.BytesIO(content), weights_only=False)  # we wrote it
    known = places(value)
    *path, key = rng.choice(known)
    holder = value
    for step in path:
        holder = holder[step]
    if isinstance(holder[key], Tensor) and rng.random() < 0.8:
        giant = torch.zeros(1).expand(10**6, 10**6) if rng.random() < 0.1 else None
        holder[key] = changed_tensor(rng, holder[key]) if giant is None else giant
    elif rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(ODD)
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def changed_record(rng: random.Random, content: bytes) -> bytes:
    """One record of the archive damaged, under a checksum that is right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            record = old.read(name)
            new.writestr(name, rng.choice(BYTES)(rng, record or b"\0") if name == chosen else record)
    return out.getvalue()


class Shell:
    """What a pickle must not be able to do."""

    def __reduce__(self) -> Any:
        return __import__("os").system, ("touch hostile-pickle-was-here",)


def dangerous(rng: random.Random, content: bytes) -> bytes:
    out = io.BytesIO()
    torch.save({"state_dict": {"a": Shell()}, "b": torch.zeros(2)}, out)
    return rng.choice((out.getvalue(), pickle.dumps(Shell()), pickle.dumps({"a": Shell()})))


TORCH: tuple[Damage, ...] = (
    changed_content,
    changed_content,
    changed_content,
    changed_record,
    changed_record,
    dangerous,
    *BYTES,
)


# Pictures


def changed_facts(rng: random.Random, content: bytes) -> bytes:
    """A PNG whose facts, in JSON or in words, say something else."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        chunks = PngInfo()
        for name, text in image.info.items():
            damage = changed_json if name == "sdkit" and rng.random() < 0.8 else rng.choice(BYTES)
            changed = damage(rng, text.encode()) if rng.random() < 0.9 else b""
            if changed:
                chunks.add_text(name, changed.decode("latin-1"))
        image.save(out := io.BytesIO(), format="PNG", pnginfo=chunks)
    return out.getvalue()


PICTURE: tuple[Damage, ...] = (changed_facts, changed_facts, changed_facts, changed_facts, *BYTES)

BY_ENDING: dict[str, tuple[Damage, ...]] = {
    ".json": JSON,
    ".jsonl": LINES,
    ".csv": LINES,
    ".txt": LINES,
    ".safetensors": SAFETENSORS,
    ".pt": TORCH,
    ".bin": TORCH,
    ".png": PICTURE,
}


def damaged(rng: random.Random, name: str, content: bytes) -> tuple[str, bytes]:
    """What was done, and the file's bytes after it."""
    damage = rng.choice(BY_ENDING[name[name.rindex(".") :]])
    return getattr(damage, "__name__", "lines"), damage(rng, content)
