"""A studio of a small untrained model, with a folder of networks."""

from __future__ import annotations

from pathlib import Path

import pytest

import finetune
from finetune.hypernetwork.network import Hypernetwork
from sdkit.model_parts import ModelParts
from sdkit.ui.studio import Studio, find_networks
from tests.conftest import draw_weights
from tests.sdkit.tiny import model


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA, in it another with a hypernetwork, and files that are neither."""
    folder, sd = tmp_path_factory.mktemp("networks"), model()
    finetune.add_lora(sd, rank=2, name="stars", init="gaussian")
    for name, parameter in sd.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.3)
    finetune.save_adapter(sd, folder / "stars.safetensors", "stars")

    (folder / "styles").mkdir()
    draw_weights(Hypernetwork([32], activation_func="swish"), seed=1).save(folder / "styles" / "blur.pt")
    (folder / "notes.bin").write_bytes(b"no weights")
    (folder / "readme.txt").write_text("no network")
    return folder


@pytest.fixture
def studio(tmp_path: Path, networks: Path) -> Studio:
    return Studio(model, ModelParts("tiny"), find_networks(networks), tmp_path / "out")
