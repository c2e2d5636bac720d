"""The choice of implementation, and the common surroundings of every Triton op.

"auto" takes a Triton kernel where there is one for the input, "triton" insists on it, "eager" takes the definition in
``reference.py``. The environment variable ``SDKERNELS_BACKEND`` sets it for the process; ``with backend("eager"):`` for
a block, in this thread or asyncio task alone (``in_force.py``): two threads never see or restore each other's, and a
new thread starts with the process's. A backward pass uses the kernels that its forward pass used, and reads no setting.

A kernel runs on tensors of an NVIDIA GPU. With ``TRITON_INTERPRET=1``, set before triton is imported, "triton" also
runs on CPU tensors, slowly, in Triton's interpreter: that is how the kernels are tested where there is no GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import in_force
from .gpus import GPUS
from .in_force import Device

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("auto", "triton", "eager")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")  # of our operators; the folder may be loaded twice
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class UnsupportedError(RuntimeError):
    """Raised under "triton" where the op has no kernel for the input; the message names the op and the reason."""


# Set by ``backend`` only within a function that torch.compile traces: there no context variable can be set, while a
# global is the tracer's own copy and holds None again when the compiled function ends.
_traced: str | None = None


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, found {name!r}")
    return name


def current() -> str:
    """The backend in force. Raises ValueError when the environment names an unknown one."""
    return _traced or in_force.backend or _checked(os.environ.get("SDKERNELS_BACKEND", "auto"), "SDKERNELS_BACKEND")


@contextmanager
def backend(name: str) -> Generator[None]:
    """Use the backend ``name`` inside the block, in this thread alone. Raises ValueError for an unknown name."""
    global _traced
    name = _checked(name, "backend")

    if torch.compiler.is_dynamo_compiling():
        before, _traced = _traced, name
        try:
            yield
        finally:
            _traced = before
        return

    token = in_force.backend_variable.set(name)
    try:
        yield
    finally:
        in_force.backend_variable.reset(token)


@contextmanager
def simulate(capability: int) -> Generator[None]:
    """Let tensors on the meta device count as lying on a GPU of this capability (90 for sm_90), in this thread alone.

    For ``compile_report``, which notes the launches and compiles them, and for counting launches.
    """
    token = in_force.device_variable.set(Device(capability, GPUS[capability].multiprocessors))
    try:
        yield
    finally:
        in_force.device_variable.reset(token)


def device_of(x: Tensor) -> Device:
    """The GPU that x lies on; an H100's figures under the interpreter."""
    simulated = in_force.device
    if simulated is not None:
        return simulated
    return Device(90, 132) if x.device.type == "cpu" else _gpu(x.device.index)


@functools.cache
def _gpu(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(10 * found.major + found.minor, found.multi_processor_count)


def use_kernel(op: str, why_not: str | None, *tensors: Tensor | None) -> bool:
    """Whether ``op`` runs its kernel on ``tensors``, the first of which decides the device.

    ``why_not`` is the op's own reason against it. Raises UnsupportedError under "triton" when there is one.
    """
    choice = current()
    if choice == "eager":
        return False

    first, *others = [t for t in tensors if t is not None]
    if choice == "auto" and first.device.type != "cuda" and in_force.device is None:
        return False

    reason = why_not or _why_not(first, others)
    if reason is None:
        return True
    if choice == "auto":
        return False
    raise UnsupportedError(f'{op}: {reason}; use backend "auto" or "eager"')


def fuses(x: Tensor) -> bool:
    """Whether ops on tensors like x run kernels: what can be left to them, such as the adding of a bias.

    Not under autocast, which gives the tensors of one op different dtypes.
    """
    choice, kind = current(), x.device.type
    if choice == "eager" or (choice == "auto" and kind != "cuda" and in_force.device is None):
        return False
    casts = kind != "meta" and torch.is_autocast_enabled(kind)  # which knows no meta device
    return not casts and _why_not(x, []) is None


def _why_not(first: Tensor, others: list[Tensor]) -> str | None:
    """The reason why no kernel runs on these tensors, if there is one."""
    device = first.device
    if device.type == "cpu" and not INTERPRETED:
        return "its kernel needs a CUDA device (or TRITON_INTERPRET=1), and the input is on the CPU"
    if device.type not in ("cuda", "cpu") and not (device.type == "meta" and in_force.device is not None):
        return f"its kernel needs a CUDA device, and the input is on {device}"

    for t in (first, *others):
        if t.device != device:
            return f"its inputs are on {device} and {t.device}"
        if t.is_floating_point() and t.dtype not in DTYPES:
            return f"its kernel takes float32, float16 and bfloat16, not {t.dtype}"
        if t.dtype == torch.bfloat16 and device.type == "cpu":
            return "Triton's interpreter computes bfloat16 wrongly"
        if t.dtype == torch.bfloat16 and device_of(first).capability < 80:
            return f"bfloat16 needs compute capability 8.0, and {device} has {device_of(first).capability / 10}"
        if t.numel() == 0:
            return "an input is empty"
    return None


def opaque(fake: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a launcher one operator for torch.compile; ``fake`` returns empty tensors like its results.

    Outside of torch.compile the launcher is called directly: an operator's dispatch costs more than a launch. The first
    argument is a tensor, and its device is made the current one.
    """

    def decorate(launch: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(launch)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            with _current_device(args[0].device):  # type: ignore[attr-defined]
                return launch(*args, **kwargs)

        operator: Any = torch.library.custom_op(f"{NAMESPACE}::{launch.__name__}", guarded, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(launch)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return operator(*args, **kwargs) if torch.compiler.is_compiling() else guarded(*args, **kwargs)

        return call

    return decorate


def _current_device(device: torch.device) -> AbstractContextManager[None]:
    """Inside the block a GPU is the current device: Triton launches there. Costs nothing where it is so already."""
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if other else nullcontext()


class _Forgetful:
    """What the forward pass of an autograd function is given where there is no backward pass to keep anything for."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep nothing."""


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, or its forward pass alone where nothing asks for a gradient: 7 us of CPU less.

    A tangent of forward-mode differentiation asks too, and is then refused by autograd.
    """
    wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
    tangents = forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]  # what unpack_dual asks, 12 times as slow
    if wanted or tangents or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(_Forgetful(), *args)


def reference_only(op: Callable[P, R]) -> Callable[P, R]:
    """Mark an op that has no Triton kernel: its definition runs, and asking for "triton" is an error."""

    @functools.wraps(op)
    def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
        if current() == "triton":
            raise UnsupportedError(f'{op.__name__}: no Triton kernel in this version; use backend "auto" or "eager"')
        return op(*args, **kwargs)

    return dispatch
