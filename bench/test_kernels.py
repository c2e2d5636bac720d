"""Every kernel beside its peers at the shapes of Stable Diffusion: ``pytest bench/test_kernels.py``.

On a GPU: the hot cases in half precision; eager PyTorch, the same compiled, and for attention each backend of PyTorch's
SDPA by itself. On a CPU: the odd cases in float32, eager and compiled alone (the kernels do not run there), as a check
that the suite works. An op that is wrong is not timed. ``--benchmark-json`` keeps the figures for ``bench.report``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sdkernels
from bench.timing import DEVICE, GPU, Ceilings, copies, machine, repeated
from sdkernels import reference
from sdkernels.op_spec import Case, Inputs, OpSpec, bytes_moved
from sdkernels.registry import OPS

DTYPE = torch.float16 if GPU else torch.float32
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def implementations(spec: OpSpec) -> list[str]:
    """The names of an op's implementations: ours first, then its peers."""
    attention = spec.name in ("self_attention", "cross_attention")
    peers = [f"sdpa {name}" for name in SDPA] if attention and GPU else ["eager", "compiled"]
    return (["ours"] if GPU else []) + peers


def cases() -> list[Any]:
    return [
        pytest.param(spec, case, direction, name, id=f"{spec.name}-{case.name}-{direction}-{name}".replace(" ", "_"))
        for spec in OPS.values()
        for case in (spec.hot if GPU else spec.odd[1:3])
        for direction in (("forward", "both") if spec.gradients else ("forward",))
        for name in implementations(spec)
    ]


@contextmanager
def implementation(spec: OpSpec, name: str) -> Generator[Callable[..., Any]]:
    """The op as ``name`` does it, inside the block."""
    with ExitStack() as stack:
        if name == "ours":
            stack.enter_context(sdkernels.backend("triton"))
            yield getattr(sdkernels, spec.name)
        elif name == "compiled":
            yield torch.compile(getattr(reference, spec.name), dynamic=False)
            torch.compiler.reset()
        else:
            if name.startswith("sdpa "):
                stack.enter_context(sdpa_kernel(SDPA[name.removeprefix("sdpa ")]))
            yield getattr(reference, spec.name)


def call_of(op: Callable[..., Any], spec: OpSpec, inputs: Inputs, direction: str) -> Callable[[], Any]:
    """A call on these inputs; "both" is forward and the gradients of all that has one, for a fixed upstream."""
    if direction == "forward":
        return lambda: op(**inputs)

    leaves = {
        k: v.detach().requires_grad_(k in spec.gradients) if isinstance(v, Tensor) else v for k, v in inputs.items()
    }

    wanted = [v for k, v in leaves.items() if k in spec.gradients and isinstance(v, Tensor)]
    outs = op(**leaves)
    upstream = [torch.randn_like(o) for o in (outs if isinstance(outs, tuple) else (outs,))]

    def both() -> Any:
        found = op(**leaves)
        return torch.autograd.grad(found if isinstance(found, tuple) else (found,), wanted, upstream)

    return both


def is_right(spec: OpSpec, inputs: Inputs) -> bool:
    """Whether our op agrees with its definition in float32 on these inputs."""
    wide = {k: v.float() if isinstance(v, Tensor) and v.dtype == DTYPE else v for k, v in inputs.items()}
    with sdkernels.backend("triton"):
        ours = getattr(sdkernels, spec.name)(**inputs)
    theirs = getattr(reference, spec.name)(**wide)
    pairs = zip(*(o if isinstance(o, tuple) else (o,) for o in (ours, theirs)), strict=True)
    return all(float((a.float() - b).norm()) <= TOLERANCE[DTYPE] * float(b.norm()) for a, b in pairs)


@pytest.mark.parametrize(("spec", "case", "direction", "name"), cases())
def test_kernel(benchmark: Any, limits: Ceilings, spec: OpSpec, case: Case, direction: str, name: str) -> None:
    first = spec.inputs(case, DTYPE, DEVICE)
    if name == "ours" and not is_right(spec, first):
        pytest.fail(f"{spec.name} is wrong at {case.name}: not timed")

    with implementation(spec, name) as op, torch.set_grad_enabled(direction == "both"):
        try:
            outputs = op(**first)
        except RuntimeError as error:
            if name.startswith("sdpa "):
                pytest.skip(f"{name} does not take this case: {str(error).splitlines()[0]}")
            raise

        moved = bytes_moved(first, outputs)
        sets = [first] + [spec.inputs(case, DTYPE, DEVICE, seed=k) for k in range(1, copies(moved, DEVICE))]
        calls = [call_of(op, spec, inputs, direction) for inputs in sets]

        if GPU:
            torch.cuda.reset_peak_memory_stats()
        run, count = repeated(calls, DEVICE)
        benchmark.pedantic(run, rounds=20 if GPU else 5, warmup_rounds=3)

    ordered = sorted(benchmark.stats.stats.data)
    benchmark.extra_info.update(
        op=spec.name,
        case=case.name,
        direction=direction,
        implementation=name,
        dtype=str(DTYPE),
        calls=count,
        microseconds={q: 1e6 * ordered[int(q / 100 * (len(ordered) - 1))] / count for q in (20, 50, 80)},
        bytes=moved,
        flops=spec.flops(**case.sizes),
        copy=limits.copy,
        matrix=limits.matrix,
        machine=machine(DEVICE),
        peak_memory=torch.cuda.max_memory_allocated() if GPU else None,
    )
