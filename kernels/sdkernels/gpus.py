"""What the static model and the compile report know of GPUs: the room on a multiprocessor, clocks, rates, bandwidths.

One card stands for each architecture. Sources: CUDA programming guide, "Compute Capabilities" (room) and "Arithmetic
Instructions" (results a clock and multiprocessor); NVIDIA's data sheets and architecture papers of the cards; latencies
from Luo et al., arXiv 2402.13499, table IV, where Blackwell's are taken to be as Hopper's and Ada's.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """The room on a multiprocessor; shared memory in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_reserved: int  # of each block, by the system
    shared_block: int  # what a block gets at most


LIMITS = {
    75: Limits(32, 16, 64 << 10, 0, 64 << 10),
    80: Limits(64, 32, 164 << 10, 1 << 10, 163 << 10),
    86: Limits(48, 16, 100 << 10, 1 << 10, 99 << 10),
    89: Limits(48, 24, 100 << 10, 1 << 10, 99 << 10),
    90: Limits(64, 32, 228 << 10, 1 << 10, 227 << 10),
    100: Limits(64, 32, 228 << 10, 1 << 10, 227 << 10),
    120: Limits(48, 24, 100 << 10, 1 << 10, 99 << 10),
}
TENSOR_MEMORY = 512  # columns, sm_100
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of a warp a clock


def occupancy(arch: int, warps: int, registers: int, shared: int) -> int:
    """Warps that fit on a multiprocessor at once, for blocks of ``warps`` with this much of each.

    As NVIDIA's cuda_occupancy.h counts it: a quarter of the multiprocessor has 16384 registers, a warp takes them in
    units of 256, and a block its shared memory in units of 128 bytes (256 before sm_80).
    """
    limits = LIMITS[arch]
    unit = 128 if arch >= 80 else 256
    by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256)) // warps
    room = -(-(shared + limits.shared_reserved) // unit) * unit
    blocks = min(limits.blocks, limits.warps // warps, by_registers, limits.shared // room if room else limits.blocks)
    return blocks * warps


class Gpu(NamedTuple):
    """A card. Clocks are those that a warp's instruction occupies its scheduler's unit, or as it says."""

    name: str
    multiprocessors: int
    clock: float  # Hz, as boosted and held
    bandwidth: float  # of its memory, bytes a second
    fma: float  # FFMA, FADD, FMUL
    alu: float  # integers, comparisons, selections
    mufu: float  # exp2, log2, reciprocals, and conversions that go the same way
    products: float  # multiply-adds of half precision, summed in float32, a clock and multiprocessor
    l2_bytes: float  # that a multiprocessor gets from the L2 a clock, while all ask
    l2_latency: int  # clocks
    latency: int  # clocks to memory
    launch_latency: float | None = None  # seconds of one more small kernel in a graph, where it was measured


GPUS = {
    75: Gpu("T4", 40, 1.59e9, 320e9, 2, 2, 8, 512, 19, 240, 440),
    80: Gpu("A100 SXM 80GB", 108, 1.41e9, 2039e9, 2, 2, 8, 1024, 28, 262, 466),
    86: Gpu("RTX 3090", 82, 1.695e9, 936e9, 1, 2, 8, 256, 16, 262, 466),
    89: Gpu("RTX 4090", 128, 2.52e9, 1008e9, 1, 2, 8, 256, 16, 273, 542),
    90: Gpu("H100 SXM", 132, 1.755e9, 3350e9, 1, 2, 8, 2048, 24, 263, 479),
    100: Gpu("B200", 148, 1.86e9, 7700e9, 1, 2, 8, 4096, 24, 263, 479),
    120: Gpu("RTX 5090", 170, 2.407e9, 1792e9, 1, 1, 8, 256, 16, 273, 542),
}
