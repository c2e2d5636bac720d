"""Files of tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from sdkit.checkpoints.tensors import read_state, write_state
from tests.sdkit.checkpoints.models import assert_same


def test_state_keeps_integers_and_metadata(tmp_path: Path) -> None:
    state = {"a": torch.arange(3), "b": torch.randn(2, 3).t(), "c": torch.randn(4)[::2]}
    write_state(state, tmp_path / "x.safetensors", torch.bfloat16, {"note": "hello"})
    read, metadata = read_state(tmp_path / "x.safetensors")
    assert_same(read, {"a": state["a"], "b": state["b"].bfloat16(), "c": state["c"].bfloat16()})
    assert metadata == {"format": "pt", "note": "hello"}
