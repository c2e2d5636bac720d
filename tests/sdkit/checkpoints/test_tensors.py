"""Files of tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdkit.checkpoints.tensors import read_state, write_state
from sdkit.errors import ConfigError, NumericalError
from tests.sdkit.checkpoints.models import assert_same


def test_state_keeps_integers_and_metadata(tmp_path: Path) -> None:
    state = {"a": torch.arange(3), "b": torch.randn(2, 3).t(), "c": torch.randn(4)[::2]}
    write_state(state, tmp_path / "x.safetensors", torch.bfloat16, {"note": "hello"})
    read, metadata = read_state(tmp_path / "x.safetensors")
    assert_same(read, {"a": state["a"], "b": state["b"].bfloat16(), "c": state["c"].bfloat16()})
    assert metadata == {"format": "pt", "note": "hello"}


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    """Also in another process: the library's order of the metadata is random in each."""
    program = """
import sys, torch
from sdkit.checkpoints.tensors import write_state
facts = {f"name {k}": "ä \\" \\\\ \\n \\x01 /" for k in range(12)}
write_state({"b": torch.arange(3.0), "a": torch.ones(2).half()}, sys.argv[1], None, facts)
"""
    for name in ("one", "two", "three"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=True)
    first, *others = ((tmp_path / name).read_bytes() for name in ("one", "two", "three"))
    assert others == [first, first]
    state, metadata = read_state(tmp_path / "one")
    assert metadata["name 3"] == 'ä " \\ \n \x01 /'
    assert torch.equal(state["b"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (70_000.0, torch.float16, "b is not saved: its largest value does not fit torch.float16"),
        (float("nan"), None, "b is not saved: it has NaN or infinity"),
        (float("-inf"), torch.bfloat16, "b is not saved: it has NaN or infinity"),
    ],
)
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float, dtype: torch.dtype | None, message: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_text("what was there")
    with pytest.raises(NumericalError, match=message):
        write_state({"a": torch.ones(3), "b": torch.tensor([1.0, value])}, file, dtype)
    assert file.read_text() == "what was there"
    write_state({"a": torch.tensor([70_000.0])}, file, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_weights_are_written_in_floating_point(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"dtype: expected one of torch\.float16, .*, found torch"):
        write_state({"a": torch.ones(3)}, tmp_path / "x.safetensors", dtype)
