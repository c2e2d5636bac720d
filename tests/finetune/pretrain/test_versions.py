"""The comparison of text encoders: what is measured of both, and where it is written."""

import json
from pathlib import Path

import pytest
from PIL import Image

from finetune.pretrain import versions
from finetune.pretrain.world.pictures import SIZE
from sdkit.checkpoints.loading import MODELS
from sdkit.files import section


def test_both_versions_are_measured_alike_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, share in (("v1", 90.0), ("v2", 95.5)):
        (tmp_path / name / "clip").mkdir(parents=True)
        (tmp_path / name / "model").symlink_to(MODELS / "tabletop")
        (tmp_path / name / "clip" / "results.json").write_text(json.dumps({"named": share}))
    (tmp_path / "latent-diffusion.md").write_text("<!-- versions --><!-- /versions -->")
    monkeypatch.setattr(versions, "RESULTS", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "DOCS", tmp_path)
    monkeypatch.setattr(versions, "STEPS", 2)
    versions.main((tmp_path / "v1", tmp_path / "v2"), count=2)

    first, second = json.loads((tmp_path / "versions.json").read_text()).values()
    assert list(first) == list(second) and len(first) == 6
    assert (first["CLIP: named, %"], second["CLIP: named, %"]) == (90.0, 95.5)
    rest = [key for key in first if "named" not in key]
    assert all(first[key] == second[key] for key in rest)  # they are one model here
    table = section(tmp_path / "latent-diffusion.md", "versions")
    assert "| CLIP: named, % | 90.0 | 95.5 |" in table
    with Image.open(tmp_path / "versions.png") as sheet:
        width, height = sheet.size
    assert width > 6 * SIZE and height > 2 * SIZE
