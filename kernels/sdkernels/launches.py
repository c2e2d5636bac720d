"""The launches of an op, noted on tensors without data as Triton's JIT would make them, on a machine without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import registry
from .backend import backend, simulate
from .op_spec import Case, OpSpec, bytes_moved

PACKAGE = sys.modules[registry.__name__.rpartition(".")[0]]


class Noted(NamedTuple):
    """A launch that was not made: its kernel, what its compilation would get, its grid, its arguments by name."""

    kernel: Any
    compilation: dict[str, Any]
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class Launch(NamedTuple):
    """A launch, specialized as the JIT does it; ``ideal``: bytes of the case's whole forward pass, each tensor once."""

    op: str
    case: str
    ideal: int
    dtype: str
    arch: int
    backward: bool
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def binary(self) -> str:
        """A key that is the same for launches of the same machine code."""
        return f"{self.arch} {self.kernel} {self.signature} {self.constants} {self.attributes} {self.options}"

    @property
    def bytes(self) -> int:
        """Bytes of its tensors, each of which it reads or writes once at least."""
        return bytes_moved(self.arguments, ())


class _Driver:
    """A stand-in for the CUDA driver, which the JIT asks only for the GPU to specialize for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # no real device has this number: what the JIT remembers of it stays apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def noting(arch: int, choice: str = "triton") -> Generator[list[Noted]]:
    """Inside the block a launch on meta tensors is only noted.

    choice: the backend; "auto" takes the kernels that it would take on a GPU of this architecture.
    """
    noted: list[Noted] = []
    compilations: list[dict[str, Any]] = []
    run = JITFunction.run

    def hook(*, compile: Any, **_: Any) -> bool:
        compilations.append(compile)
        return True  # no need to compile: the JIT then launches nothing

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> Any:
        result = run(self, *args, grid=grid, warmup=warmup, **given)
        arguments = dict(zip(self.arg_names, args, strict=False)) | given
        noted.append(Noted(self, compilations.pop(), grid(arguments) if callable(grid) else grid, arguments))
        return result

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
    JITFunction.run = note  # type: ignore[method-assign]
    driver.set_active(_Driver(arch))  # type: ignore[arg-type]  # as much of a driver as it takes
    try:
        with simulate(arch), backend(choice):
            yield noted
    finally:
        knobs.runtime.jit_cache_hook = before
        JITFunction.run = run  # type: ignore[method-assign]
        driver.set_active(None)  # type: ignore[arg-type]  # the next to ask finds the machine's own


def launch_of(noted: Noted, arch: int, **known: Any) -> Launch:
    """A noted launch as the JIT specializes it; ``known``: what it cannot tell of itself, fields of `Launch`."""
    given = noted.compilation
    stored = json.loads(given["specialization_data"])["options"]  # all of them; lists were tuples
    return Launch(
        arch=arch,
        kernel=noted.kernel,
        signature=given["signature"],
        constants=given["constants"],
        attributes=given["configs"][0],
        options={name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()},
        grid=noted.grid,
        arguments=noted.arguments,
        **known,
    )


def launches(spec: OpSpec, case: Case, dtype: torch.dtype, arch: int) -> Iterator[Launch]:
    """The op's launches for a case, forward and backward."""
    inputs = spec.inputs(case, dtype, "meta")
    leaves = [inputs[name].requires_grad_() for name in spec.gradients if isinstance(inputs.get(name), Tensor)]
    with noting(arch) as noted:
        out = getattr(PACKAGE, spec.name)(**inputs)
        forward = len(noted)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        if outs:
            torch.autograd.grad(outs, leaves, [torch.empty_like(o) for o in outs])

    for number, one in enumerate(noted):
        yield launch_of(
            one,
            arch,
            op=spec.name,
            case=case.name,
            dtype=str(dtype).removeprefix("torch."),
            ideal=bytes_moved(inputs, out),
            backward=number >= forward,
        )
