"""Where networks run, and in what precision."""

from __future__ import annotations

import torch

from sdkit.checks import check_kind, expect
from sdkit.errors import ConfigError


def find_device(device: str | int | torch.device | None = None) -> torch.device:
    """Find a device and try it out; None stands for the GPU if there is one, else for the CPU.

    Raises ConfigError when there is no such device, or it does not work.
    """
    check_kind("device", device, (str, int, torch.device, type(None)), "the name of a device, or None")
    place = device if device not in (None, "") else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {str(place)!r} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(place)


def fast_layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The order of a convolution's weights in memory that computes fastest: channels-last on a GPU, where cuDNN would
    else copy them at every call, and on a CPU in bfloat16. Values and state dicts are the same in both orders."""
    last = device.type == "cuda" or dtype == torch.bfloat16
    return torch.channels_last if last else torch.contiguous_format


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights are computed with and written in."""


def check_dtype(dtype: object) -> None:
    """Raise ConfigError unless this is one of DTYPES, or None."""
    expect(dtype is None or dtype in DTYPES, "dtype", f"one of {', '.join(map(str, DTYPES))}, or None", dtype)


def find_dtype(name: str | None) -> torch.dtype | None:
    """torch's dtype of this name; None for None."""
    return None if name is None else getattr(torch, name)


LARGE = 300_000_000
"""Parameters from which on a model is worth half the memory on a CPU; Stable Diffusion 1 has 1.07 billion."""


def default_dtype(device: torch.device, parameters: int = 0) -> torch.dtype:
    """float16 on a GPU, else float32; bfloat16 for a LARGE model where the processor multiplies that."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if parameters >= LARGE and multiplies_bfloat16() else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; emulated, it is 100 times slower than float32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
