"""Loading and saving by path: a folder or a single file."""

from __future__ import annotations

from pathlib import Path

import torch

from sdkit.checkpoints.components import Components
from sdkit.checkpoints.loading import load, save
from tests.sdkit.checkpoints.models import assert_same


def test_load_and_save_choose_by_path(ours: Components, tmp_path: Path) -> None:
    save(ours, tmp_path / "m.safetensors", dtype=torch.float16)
    loaded = load(tmp_path / "m.safetensors", dtype=torch.float32)
    save(loaded, tmp_path / "folder")
    assert_same(dict(load(tmp_path / "folder").unet.state_dict()), dict(loaded.unet.state_dict()))
