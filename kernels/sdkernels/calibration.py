"""What was measured on a GPU, for the static model to count with: ``calibration.json``, one entry an architecture.

    {"90": {"gpu": "NVIDIA H100 80GB HBM3", "copy_bandwidth": 2.9e12, "matrix_rate": 6.5e14, "launch_latency": 2.1e-6}}

Without an entry the model counts with data sheets (``gpus.py``), and says "uncalibrated".
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from .gpus import GPUS, Gpu

FILE = Path(__file__).with_name("calibration.json")


class Calibration(NamedTuple):
    """One GPU's figures.

    Attributes:
        gpu: its name.
        copy_bandwidth: bytes a second of a large copy, those read and those written.
        matrix_rate: floating-point operations a second of a large float16 product that sums in float32.
        launch_latency: seconds that a graph takes for one more small kernel that waits for the one before.
    """

    gpu: str
    copy_bandwidth: float
    matrix_rate: float
    launch_latency: float


def calibrated(arch: int, file: Path = FILE) -> Gpu:
    """The GPU of an architecture as measured, that of the data sheets where nothing was: see ``read_calibration``."""
    gpu, measured = GPUS[arch], read_calibration(arch, file)
    if measured is None:
        return gpu
    return gpu._replace(
        name=measured.gpu,
        bandwidth=measured.copy_bandwidth,
        products=measured.matrix_rate / 2 / gpu.clock / gpu.multiprocessors,
        launch_latency=measured.launch_latency,
    )


def read_calibration(arch: int, file: Path = FILE) -> Calibration | None:
    """An architecture's figures (90 for sm_90), None where there are none. Raises ValueError for malformed ones."""
    entry = json.loads(file.read_text(encoding="utf-8")).get(str(arch)) if file.is_file() else None
    return None if entry is None else _checked(entry, f"{file.name}, {arch}")


def write_calibration(arch: int, measured: Calibration, file: Path = FILE) -> None:
    """Put an architecture's figures into the file, beside those of others. Raises ValueError for malformed ones."""
    _checked(measured._asdict(), f"the calibration of {arch}")
    others = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    content = others | {str(arch): measured._asdict()}
    file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _checked(entry: object, where: str) -> Calibration:
    if not isinstance(entry, dict) or set(entry) != set(Calibration._fields):
        raise ValueError(f"{where}: expected {', '.join(Calibration._fields)}, found {entry!r}")
    if not isinstance(entry["gpu"], str):
        raise ValueError(f"{where}: gpu must be a name, found {entry['gpu']!r}")

    for name in Calibration._fields[1:]:
        value = entry[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{where}: {name} must be a positive number, found {value!r}")
    return Calibration(**entry)
