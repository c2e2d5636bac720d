"""Every kernel beside its peers at the shapes of Stable Diffusion: ``python -m bench.kernels``.

On a GPU: half precision, one picture before four, SD1 before SD2, attention and group norm first, until the time is up.
Peers are eager PyTorch, for attention each backend of PyTorch's SDPA by itself (FlashAttention 3 where it is
installed); beside an op without products stands a copy of as many bytes. ``--compiled`` times what torch.compile makes
of the definitions instead. A case in which our result is wrong is not timed. On a CPU: an odd case, as a rehearsal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import sdkernels
from bench.check_kernels import DTYPES, is_right, name_of
from bench.record import DEVICE, GPU, Clock, Record, Row, parser_of, reason_of
from sdkernels import reference
from sdkernels.op_spec import Case, Inputs, OpSpec, bytes_moved
from sdkernels.registry import OPS
from sdkernels.timing import call_of, rotation, time_kernels

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa flash 3": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}
FIRST = ("self_attention", "cross_attention", "group_norm")
MODELS = ("sd1", "vae", "sd2")


def in_order() -> list[tuple[OpSpec, Case]]:
    """What matters most, first."""
    if not GPU:
        return [(spec, spec.odd[1]) for spec in OPS.values()]

    def rank(pair: tuple[OpSpec, Case]) -> tuple[bool, int, int]:
        spec, case = pair
        op = FIRST.index(spec.name) if spec.name in FIRST else len(FIRST)
        model = case.name.split()[0]
        return case not in spec.one_picture, MODELS.index(model) if model in MODELS else len(MODELS), op

    return sorted(((spec, case) for spec in OPS.values() for case in spec.hot), key=rank)


def implementations(spec: OpSpec, both: bool, compiled: bool) -> list[str]:
    """The names of an op's implementations: ours first, then its peers."""
    if compiled:
        return ["compiled"]
    attends = spec.name in ("self_attention", "cross_attention")
    peers = list(SDPA) if attends and GPU else ["eager"]
    return ["ours", *peers, *(["copy"] if not both and spec.flops(**spec.hot[0].sizes) == 0 else [])]


@contextmanager
def implementation(spec: OpSpec, name: str, moved: int) -> Generator[Callable[..., Any]]:
    """The op as ``name`` does it, inside the block. moved: bytes of its inputs and outputs."""
    with ExitStack() as stack:
        if name == "ours":
            stack.enter_context(sdkernels.backend("triton"))
            yield getattr(sdkernels, spec.name)
        elif name == "copy":
            source = torch.randn(max(1, moved // 8), device=DEVICE)
            pairs = cycle(rotation({"source": source, "target": torch.empty_like(source)}, moved, DEVICE))
            yield lambda **_: _copy(**next(pairs))
        elif name == "compiled":
            yield torch.compile(getattr(reference, spec.name), dynamic=False, fullgraph=True)
            torch.compiler.reset()
        else:
            if name == "sdpa flash 3":
                attention.activate_flash_attention_impl("FA3")
                stack.callback(attention.restore_flash_attention_impl)
            if name in SDPA:
                stack.enter_context(sdpa_kernel(SDPA[name]))
            yield getattr(reference, spec.name)


def _copy(source: Tensor, target: Tensor) -> Tensor:
    return target.copy_(source)


def time_case(record: Record, spec: OpSpec, case: Case, both: bool, name: str, inputs: Inputs, moved: int) -> bool:
    """Enter the times of one implementation, or why there are none; whether there are."""
    row: Row = {"op": spec.name, "case": case.name, "direction": "both" if both else "forward", "implementation": name}
    row |= {"dtype": name_of(DTYPES[0]), "bytes": moved, "flops": spec.flops(**case.sizes)}

    try:
        with implementation(spec, name, moved) as op, torch.set_grad_enabled(both):
            row["peak_memory"] = peak_memory(call_of(op, spec, inputs, both))
            calls = [call_of(op, spec, one, both) for one in rotation(inputs, moved, DEVICE)]
            times = time_kernels(calls, DEVICE, samples=20 if GPU else 3)
    except Exception as error:  # a backend that does not take the case, a library that is not there
        record.add("missed", **row, reason=reason_of(error))
        return False
    record.add("time", **row, microseconds=asdict(times))
    return True


def peak_memory(call: Callable[[], Any]) -> int:
    """The most bytes that a call holds beside its inputs; 0 on a CPU, where nobody counts."""
    call()
    if not GPU:
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def main() -> int:
    """Time until the time is up; 1 where an op of ours is wrong or does not run."""
    parser = parser_of(__doc__)
    parser.add_argument("--compiled", action="store_true", help="beside torch.compile in place of the others")
    arguments = parser.parse_args()
    clock, record = Clock(arguments.seconds), Record(arguments.out)

    good = True
    pairs = in_order()
    for number, (spec, case) in enumerate(pairs):
        if clock.left < 0:
            print(f"out of time: {len(pairs) - number} of {len(pairs)} cases are not timed")
            break
        if not is_right(record, spec, case, DTYPES[0]):
            print(f"{spec.name} {case.name}: not known to be right, not timed", flush=True)
            good = False
            continue

        inputs = spec.inputs(case, DTYPES[0], DEVICE)
        with torch.no_grad():
            moved = bytes_moved(inputs, getattr(reference, spec.name)(**inputs))
        for both in (False, True) if spec.gradients else (False,):
            for name in implementations(spec, both, arguments.compiled):
                good &= time_case(record, spec, case, both, name, inputs, moved) or name != "ours"
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
