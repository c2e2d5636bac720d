"""The backend that ``backend`` set and the GPU that ``simulate`` set, each None where nothing did.

Both are context variables, so each thread and each asyncio task has its own. They are read as attributes of this
module, ``in_force.backend`` and ``in_force.device``, for the sake of torch.compile: up to 2.13 it cannot trace
``ContextVar.get``, but it does read a module's attribute, and reads it again before each call of what it compiled (a
guard). ``__getattr__`` answers both times, so a function is compiled anew under another backend.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple


class Device(NamedTuple):
    """The properties of a GPU that decide how a kernel is launched."""

    capability: int  # 90 for sm_90
    multiprocessors: int


backend_variable: ContextVar[str | None] = ContextVar("sdkernels.backend", default=None)
device_variable: ContextVar[Device | None] = ContextVar("sdkernels.device", default=None)

# Only declared: a value here would hide __getattr__.
backend: str | None
device: Device | None


def __getattr__(name: str) -> Any:
    if name == "backend":
        return backend_variable.get()
    if name == "device":
        return device_variable.get()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
