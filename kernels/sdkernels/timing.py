"""Times on a GPU: of kernels by themselves, many calls in one CUDA graph; and of what is called, launches included.

A kernel's inputs rotate through more memory than the L2 cache holds, and every measurement begins when the clocks have
had time to rise. On a CPU the calls are made one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .agreement import fresh
from .op_spec import Inputs, OpSpec

Call = Callable[[], Any]
GRAPH_TIME = 1e-3  # seconds of work in a graph, so that launching it costs little
WARM_UP = 0.05  # seconds of work before the first measurement


@dataclass(frozen=True)
class Times:
    """Microseconds of one call: the median, and between which 60 % of the measurements lie."""

    low: float
    median: float
    high: float


def time_kernels(calls: Sequence[Call], device: torch.device, samples: int = 20) -> Times:
    """One of these calls, which do the same on different tensors, without its launch from Python."""
    if device.type == "cpu":
        return time_calls(lambda: [call() for call in calls], device, samples, len(calls))

    graph = capture(calls, 1)
    rounds = min(100, math.ceil(GRAPH_TIME / min(_seconds(graph.replay, device) for _ in range(3))))
    if rounds > 1:
        graph = capture(calls, rounds)
    return time_calls(graph.replay, device, samples, rounds * len(calls))


def time_calls(run: Call, device: torch.device, samples: int = 20, calls: int = 1) -> Times:
    """run(), which makes so many calls, as it is launched: by events on a GPU, by the clock on a CPU."""
    rising = perf_counter() + WARM_UP
    while perf_counter() < rising:
        _seconds(run, device)

    ordered = sorted(_seconds(run, device) for _ in range(samples))
    low, median, high = (1e6 / calls * ordered[round(share * (samples - 1))] for share in (0.2, 0.5, 0.8))
    return Times(low, median, high)


def capture(calls: Sequence[Call], rounds: int) -> Any:
    """A CUDA graph of all calls, so many times; what they return is not kept."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled, chosen and loaded at a first call is forbidden in a capture
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def rotation(inputs: Inputs, size: int, device: torch.device) -> list[Inputs]:
    """The inputs of a call and copies of them: twice as many as the L2 cache holds of ``size`` bytes; 2 on a CPU."""
    count = 2
    if device.type == "cuda":
        count = max(2, math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / max(size, 1)))
    copies = ({k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()} for _ in range(count - 1))
    return [inputs, *copies]


def call_of(op: Callable[..., Any], spec: OpSpec, inputs: Inputs, both: bool) -> Call:
    """A call of an op on these inputs; both: forward, and the gradients of all that has one for a fixed upstream."""
    if not both:
        return lambda: op(**inputs)

    leaves = fresh(inputs, spec.gradients)
    wanted = [v for k, v in leaves.items() if k in spec.gradients and isinstance(v, Tensor)]
    upstream = [torch.randn_like(out) for out in _with_gradient(op(**leaves))]
    return lambda: torch.autograd.grad(_with_gradient(op(**leaves)), wanted, upstream)


def _with_gradient(out: Any) -> list[Tensor]:
    """The outputs that have a gradient: averaged probabilities have none."""
    return [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]


def _seconds(run: Call, device: torch.device) -> float:
    if device.type == "cpu":
        start = perf_counter()
        run()
        return perf_counter() - start

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
