"""Loading and saving by path: a folder or a single file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdkit.checkpoints import loading
from sdkit.checkpoints.components import Components
from sdkit.checkpoints.loading import load, save
from tests.sdkit.checkpoints.models import assert_same


def test_load_and_save_choose_by_path(ours: Components, tmp_path: Path) -> None:
    save(ours, tmp_path / "m.safetensors", dtype=torch.float16)
    loaded = load(tmp_path / "m.safetensors", dtype=torch.float32)
    save(loaded, tmp_path / "folder")
    assert_same(dict(load(tmp_path / "folder").unet.state_dict()), dict(loaded.unet.state_dict()))


def test_a_format_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its ending alone brings it to `load` and `save`."""
    seen: list[str] = []
    row = loading.Format(
        "toy",
        lambda kind: kind == "toy",
        lambda path, dtype=None: seen.append(f"read {path.name}"),
        lambda what, path, dtype=None: seen.append(f"wrote {path.name}"),
        suffix=".toy",
    )
    monkeypatch.setattr(loading, "FORMATS", (*loading.FORMATS, row))
    (tmp_path / "a.toy").write_text("")
    loading.load(tmp_path / "a.toy")
    loading.save(loading.load("tabletop"), tmp_path / "b.toy")
    assert seen == ["read a.toy", "wrote b.toy"]
