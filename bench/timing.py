"""Timing that pytest-benchmark can repeat: many calls on rotating inputs, one CUDA graph on a GPU, plain on a CPU."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Call = Callable[[], Any]
ROTATION = 192 * 2**20  # bytes over which inputs rotate: some four times an H100's L2 cache
GRAPH_TIME = 2e-3  # a graph holds about this many seconds of work, so that launching it costs little


@dataclass(frozen=True)
class Ceilings:
    """The machine's best, measured: bytes a second of a large copy (read + written), FLOP/s by dtype."""

    copy: float
    matrix: dict[str, float]


def seconds(run: Call, device: torch.device, repeats: int = 10) -> float:
    """Median time of a call, warmed up, by events on a GPU and by the clock on a CPU."""
    from time import perf_counter

    times: list[float] = []
    for k in range(repeats + 3):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            taken = begin.elapsed_time(end) / 1e3
        else:
            start = perf_counter()
            run()
            taken = perf_counter() - start
        if k >= 3:
            times.append(taken)
    return sorted(times)[len(times) // 2]


def ceilings(device: torch.device) -> Ceilings:
    """Measured on a copy of 1 GiB (64 MiB on a CPU) and on products of random square matrices of 8192 (1024)."""
    big = device.type == "cuda"
    source = torch.empty((2**30 if big else 2**26) // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device)

    matrix: dict[str, float] = {}
    for dtype in (torch.float16, torch.bfloat16) if big else (torch.float32,):
        n = 8192 if big else 1024
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        matrix[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds(lambda a=a, b=b: a @ b, device)

    return Ceilings(copy, matrix)


def copies(bytes_of_inputs: int, device: torch.device) -> int:
    """How many sets of inputs make a rotation: at least 2, at most 24; 2 on a CPU."""
    return 2 if device.type == "cpu" else max(2, min(24, ROTATION // max(1, bytes_of_inputs) + 1))


def repeated(calls: Sequence[Call], device: torch.device) -> tuple[Call, int]:
    """(run, calls in it): run() makes the calls in turn and waits for them. On a GPU they are one CUDA graph."""
    if device.type == "cpu":

        def plain() -> None:
            for call in calls:
                call()

        return plain, len(calls)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)

    rounds = max(1, min(64, int(GRAPH_TIME / max(1e-7, len(calls) * seconds(calls[0], device, 3)))))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay, rounds * len(calls)


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, driver and clocks, for the results' heading."""
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "triton": _triton()}
    if device.type == "cpu":
        return facts | {"device": f"CPU, {torch.get_num_threads()} threads", "processor": platform.machine()}
    return facts | {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, **_nvidia_smi()}


def _triton() -> str:
    try:
        import triton
    except ModuleNotFoundError:
        return "none"
    return str(triton.__version__)


def _nvidia_smi() -> dict[str, str]:
    import subprocess

    query = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"]

    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(query, (value.strip() for value in line.split(",")), strict=False))
