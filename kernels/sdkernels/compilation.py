"""A noted launch compiled: its machine code, Triton's last form of it before LLVM, and what it needs of the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launches import Launch
from .machine_code import Code, decode


@dataclass(frozen=True)
class Compiled:
    """``shared`` in bytes of a program, ``tensor_memory`` in columns; ``warps`` as the compiler left them."""

    code: Code
    ttgir: str
    warps: int
    shared: int
    tensor_memory: int


_compiled: dict[str, Compiled] = {}


def build(launch: Launch) -> Any:
    """Triton's own compiled kernel, from its cache or for it. Raises what the compiler raises."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)


def compiled(launch: Launch) -> Compiled:
    """Compile a launch, once for all of the same machine code. Raises what the compiler raises."""
    if launch.binary not in _compiled:
        built = build(launch)
        needs = built.metadata
        code = decode(built.asm["cubin"], built.asm["ptx"])
        _compiled[launch.binary] = Compiled(
            code, built.asm["ttgir"], needs.num_warps, needs.shared, needs.tmem_size or 0
        )
    return _compiled[launch.binary]
