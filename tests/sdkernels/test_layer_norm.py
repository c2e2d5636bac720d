"""LayerNorm's backward where a program takes several tiles of rows."""

import sys

import pytest
import torch

from sdkernels.backend import Device
from sdkernels.op_spec import Case
from sdkernels.registry import OPS
from tests.sdkernels.test_kernels import DEVICE, check

MODULE = sys.modules["sdkernels.layer_norm"]


@pytest.mark.parametrize("rows", [33, 64, 101])
def test_few_programs_take_many_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Four programs, eight rows at a time for widths up to 256."""
    monkeypatch.setattr(MODULE, "device_of", lambda x: Device(90, 1))
    spec = OPS["layer_norm"]
    case = Case("tall", {"rows": rows, "width": 200, "residual": True})
    check(spec, spec.inputs(case, torch.float32, DEVICE, mean=3.0), torch.float32)
