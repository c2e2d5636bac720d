"""Pickled checkpoints, read without running what is in them.

torch's own ``weights_only`` comes first. Original ``.ckpt`` files hold more than it takes: callbacks of PyTorch
Lightning, numpy scalars, ``argparse.Namespace``. For these there is an unpickler that knows tensors and plain
containers; every other global becomes a stub: nothing is imported, called, or given a state.
"""

from __future__ import annotations

import collections
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from sdkit.checkpoints.stubs import Stub, stub_of
from sdkit.checkpoints.torch_archive import check_archive
from sdkit.errors import CheckpointError, one_line, printable

logger = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which a file's tensors may lie, the first that is there; also one in another."""


def read_pickle(path: Path, device: str, stubs: bool = False) -> dict[Any, Any]:
    """Read the dict in a pickled file; on the device "meta" without its data.

    stubs: a global that is neither a tensor's nor a plain container's becomes a `Stub`, and the log names it; without
    it such a file is refused. Raises CheckpointError also for what is no dict, damaged, or a TorchScript archive.
    """
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"

    options: dict[str, Any] = {"map_location": device, "mmap": is_zip and device == "cpu"}
    try:
        content = _load(path, is_zip, stubs, options)
    except CheckpointError:
        raise
    except Exception as error:  # anything can be wrong with a pickle
        raise CheckpointError(f"{path}: damaged or no torch checkpoint: {one_line(error)}") from None

    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {_name(content)}")
    return cast("dict[Any, Any]", content)


def _load(path: Path, is_zip: bool, stubs: bool, options: Mapping[str, Any]) -> Any:
    if is_zip and "constants.pkl" in _C.PyTorchFileReader(str(path)).get_all_records():
        raise CheckpointError(f"{path}: a TorchScript archive, which holds code; only tensors are loaded")

    if is_zip:
        check_archive(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other protocols, and of modules whose source is not the one saved
        try:
            return torch.load(path, weights_only=True, **options)
        except pickle.UnpicklingError as error:  # it is damaged, or holds globals that torch does not take
            if not stubs and ("weights_only" in str(error).lower() or "Unsupported" in str(error)):
                name = re.search(r"GLOBAL ([\w.]+)", str(error))
                found = "the pickle holds code or objects" + (f" ({name[1]})" if name else "")
                raise CheckpointError(f"{path}: {found}, only tensors are loaded") from None
            return _load_with_stubs(path, options)


def unwrapped(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The mapping that holds the tensors: ``content``, or what lies in it under one of ``WRAPPERS``."""
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    return unwrapped(cast("Mapping[Any, Any]", inner)) if inner else content


def tensors_in(content: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """The tensors of a pickled dict, by their names. What else is there is left out, and the log names it.

    Raises CheckpointError when there are none, for a value that holds tensors itself, and for a tensor that repeats
    what is stored: a copy of it could fill the memory.
    """
    state = unwrapped(content)
    tensors = {k: v.detach() for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    rest = {k: v for k, v in state.items() if k not in tensors}

    key = next((k for k, v in rest.items() if _holds_tensors(v)), None)
    if key is not None or not tensors:
        key = next(iter(rest), None) if key is None else key
        found = "it is empty" if key is None else f"{key!r} is a {_name(rest[key])}"
        raise CheckpointError(f"{where}: expected a dict of tensors, but {found}")

    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            shape = list(tensor.shape)
            raise CheckpointError(f"{where}: {name}: expected {shape} numbers, found a repetition of fewer")

    if state is not content:
        rest |= {k: v for k, v in content.items() if k not in WRAPPERS}
    if rest:
        named = ", ".join(f"{key} ({_name(value)})" for key, value in list(rest.items())[:8])
        logger.info("%s: left out beside the tensors: %s%s", where, printable(named), ", …" if len(rest) > 8 else "")
    return tensors


def _holds_tensors(value: Any) -> bool:
    """Whether this is a tensor, or there is one in these nested containers."""
    if isinstance(value, Mapping):
        value = list(cast("Mapping[Any, Any]", value).values())
    if isinstance(value, list | tuple):
        return any(_holds_tensors(inner) for inner in cast("list[Any]", value))
    return isinstance(value, Tensor)


def _name(value: Any) -> str:
    kind = cast("type[Any]", value if isinstance(value, type) else type(value))
    return kind.origin if issubclass(kind, Stub) else kind.__name__


# The restricted unpickler


class _Function:
    """A function that a pickle may call, and not change: BUILD would set any attribute of the function itself."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"a state for the function {self._function.__name__}")


def _encode(text: str, encoding: str) -> bytes:
    """What pickles of Python 2's protocols make bytes with."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


_TORCH: Any = torch
_C = _TORCH._C  # its reader is torch.load's own, so both see the same archive
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
_TAKEN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    **{("torch._utils", name): _Function(getattr(_TORCH._utils, name)) for name in _REBUILD},
    ("_codecs", "encode"): _Function(_encode),
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, bytearray)},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


def _storages_alone(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """torch's way to what lies outside of the pickle, for storages alone.

    Its older files name a class with its source: that is the class. torch would compare the two sources and, where the
    class says so, write a file of what differs.
    """

    def persistent_load(place: Any) -> Any:
        return place[1] if place[0] in ("module", b"module") else find(place)

    return persistent_load


def _load_with_stubs(path: Path, options: Mapping[str, Any]) -> Any:
    """Read a pickle with stubs for every global that is not in ``_TAKEN``. torch finds the storages itself."""
    stubs: dict[str, type[Stub]] = {}

    class Unpickler(pickle.Unpickler):
        def __setattr__(self, name: str, value: Any, /) -> None:
            super().__setattr__(name, _storages_alone(value) if name == "persistent_load" else value)

        def find_class(self, module_name: str, global_name: str, /) -> Any:
            taken = _TAKEN.get((module_name, global_name))
            if taken is not None:
                return taken
            stub = stub_of(module_name, global_name)
            return stubs.setdefault(stub.origin, stub)

    def load(file: Any, **arguments: Any) -> Any:
        return Unpickler(file, **arguments).load()

    reader = SimpleNamespace(__name__="restricted", Unpickler=Unpickler, load=load)
    content = torch.load(path, weights_only=False, pickle_module=reader, **options)

    if stubs:
        logger.warning("%s: left out objects that are no tensors: %s", path, printable(", ".join(sorted(stubs))))
    return content
