"""Run every kernel once, forward and backward, on a small odd case: something for compute-sanitizer to watch.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.small_cases
"""

from __future__ import annotations

import torch

import sdkernels
from bench.record import DEVICE, GPU
from sdkernels.registry import OPS
from sdkernels.timing import call_of


def main() -> None:
    """Two cases an op, so that tails and optional inputs are both met."""
    with sdkernels.backend("triton"):
        for spec in OPS.values():
            for case in (spec.odd[1], spec.odd[-1]):
                inputs = spec.inputs(case, torch.float16, DEVICE)
                call_of(getattr(sdkernels, spec.name), spec, inputs, both=bool(spec.gradients))()
            if GPU:
                torch.cuda.synchronize()
            print(f"{spec.name} ran", flush=True)


if __name__ == "__main__":
    main()
