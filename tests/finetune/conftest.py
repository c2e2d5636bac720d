"""What the tests of several training scripts share."""

from pathlib import Path

import pytest
from PIL import Image

from tests.finetune import toy


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Its settings last for the process."""
    toy.forget_accelerate()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures with captions, of the shipped model's size."""
    (tmp_path / "data").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(f"a {name} cube")
    return tmp_path / "data"
